"""MONAI's ResNet on pictures, by stand-ins."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from support.stand_ins import conv, copy_of, pictures, projection, settled
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not


def padded(x: Tensor, planes: int, stride: int) -> Tensor:
    """MONAI's shortcut "A": a function, whose result has no gradient."""
    out = F.avg_pool2d(x, 1, stride).data
    return torch.cat([out, out.new_zeros(len(out), planes - out.shape[1], *out.shape[2:])], 1)


class Block(nn.Module):
    def __init__(self, convs: list[nn.Module], downsample: object = None, act: nn.Module | None = None) -> None:
        super().__init__()
        for i, layer in enumerate(convs, start=1):
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", nn.BatchNorm2d(layer.out_channels))
        self.count, self.downsample = len(convs), downsample
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.count + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(self.act(out) if i > 1 else out))
        out += x if self.downsample is None else self.downsample(x)
        return self.act(out)


ResNetBlock = copy_of(Block, "monai.networks.nets.resnet.ResNetBlock")
ResNetBottleneck = copy_of(Block, "monai.networks.nets.resnet.ResNetBottleneck")


def test_a_model_trains_as_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        ResNetBlock([conv(8, 8, 3), conv(8, 8, 3)]),
        ResNetBlock([conv(8, 12, 3, 2), conv(12, 12, 3)], partial(padded, planes=12, stride=2)),
        ResNetBottleneck([conv(12, 4, 1), conv(4, 4, 3), conv(4, 16, 1)], projection(12, 16), nn.LeakyReLU(0.1)),
        ResNetBottleneck([conv(16, 4, 1), conv(4, 4, 3, 2), conv(4, 20, 1)], partial(padded, planes=20, stride=2)),
    )
    assert_trains_as_eager(settled(model), pictures())
    rows = explain(fuse(model))
    assert len(rows) == len(model)
    assert {row.backend for row in rows} == {"native"}


def test_volumes_are_refused() -> None:
    block = ResNetBlock([nn.Conv3d(8, 8, 3), nn.Conv3d(8, 8, 3)])
    assert "stages[0].conv is Conv3d; accepted: nn.Conv2d" in str(why_not(block))


def test_other_norms_are_refused() -> None:
    block = ResNetBlock([conv(8, 8, 3), conv(8, 8, 3)])
    block.bn1 = nn.InstanceNorm2d(8)
    assert "stages[0].norm is InstanceNorm2d" in str(why_not(block))
