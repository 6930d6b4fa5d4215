"""InsightFace's IResNet, by a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from support.stand_ins import conv, pictures, projection, settled, stands_for
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse


@stands_for("backbones.iresnet.IBasicBlock")
class IBasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, out, 3)
        self.bn2, self.prelu, self.conv2 = nn.BatchNorm2d(out), nn.PReLU(out), conv(out, out, 3, stride)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = projection(channels, out, stride) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        out += x if self.downsample is None else self.downsample(x)
        return out


def small() -> nn.Module:
    torch.manual_seed(0)
    # without an activation between them, the gradient of the first one's last bias would be exactly zero
    return settled(nn.Sequential(IBasicBlock(8, 8), nn.ReLU(), IBasicBlock(8, 12, 2)))


def test_a_model_trains_as_eager() -> None:
    assert_trains_as_eager(small(), pictures())
    rows = explain(fuse(small()))
    assert [row.block for row in rows] == ["IBasicBlock"] * 2
    assert {row.backend for row in rows} == {"native"}


def test_activation_checkpointing_is_the_blocks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant of the file turns it on."""
    file = ModuleType("backbones.iresnet")
    file.using_ckpt = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "backbones.iresnet", file)
    assert all("using_ckpt is set" in row.reason for row in explain(small()))
    assert {row.backend for row in explain(fuse(small().eval()))} == {"native"}
