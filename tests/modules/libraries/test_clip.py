"""The ResNets of OpenCLIP and of OpenAI's CLIP, by stand-ins."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from support.stand_ins import conv, pictures, projection, settled, stands_for
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not


class Bottleneck(nn.Module):
    act = ""

    def __init__(self, channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * planes
        layers = [conv(channels, planes, 1), conv(planes, planes, 3), conv(planes, out, 1)]
        for i, layer in enumerate(layers, start=1):
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", nn.BatchNorm2d(layer.out_channels))
            setattr(self, f"{self.act}{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        parts = zip(("-1", "0", "1"), [nn.AvgPool2d(stride), *projection(channels, out)], strict=True)
        self.downsample = nn.Sequential(OrderedDict(parts)) if stride > 1 or channels != out else None

    def stage(self, i: int, x: Tensor) -> Tensor:
        return getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))

    def forward(self, x: Tensor) -> Tensor:
        acts = [getattr(self, f"{self.act}{i}") for i in (1, 2, 3)]
        out = self.stage(3, self.avgpool(acts[1](self.stage(2, acts[0](self.stage(1, x))))))
        out += x if self.downsample is None else self.downsample(x)
        return acts[2](out)


@stands_for("open_clip.modified_resnet.Bottleneck")
class OpenClipBottleneck(Bottleneck):
    act = "act"


@stands_for("clip.model.Bottleneck")
class OpenAIBottleneck(Bottleneck):
    act = "relu"


@pytest.mark.parametrize("cls", [OpenClipBottleneck, OpenAIBottleneck], ids=["OpenCLIP", "OpenAI"])
def test_a_model_trains_as_eager(cls: type[Bottleneck]) -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(cls(8, 4), cls(16, 4), cls(16, 4, 2)))
    assert_trains_as_eager(model, pictures())
    rows = explain(fuse(model))
    assert [row.reason.partition(" fused")[0] for row in rows] == ["2", "", "3"]  # calls around the poolings
    assert {row.backend for row in rows} == {"native"}


def test_a_hook_on_an_empty_pooling_is_named() -> None:
    block = OpenAIBottleneck(8, 4)
    block.avgpool.register_forward_hook(lambda *_: None)
    assert "avgpool (Identity) has hooks" in str(why_not(block))
