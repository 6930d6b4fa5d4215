"""Kornia's blocks of LoFTR and RT-DETR, by stand-ins."""

from __future__ import annotations

from collections import OrderedDict

import torch
from support.stand_ins import conv, pictures, projection, settled, stands_for
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not


@stands_for("kornia.feature.loftr.backbone.resnet_fpn.BasicBlock")
class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(channels, out, 3, stride), conv(out, out, 3)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(out), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.downsample = None if stride == 1 else projection(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


@stands_for("kornia.models.common.ConvNormAct")
class ConvNormAct(nn.Sequential):
    def __init__(self, channels: int, out: int, size: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = conv(channels, out, size, stride), nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()


class BlockD(nn.Module):
    def __init__(self, layers: list[nn.Module], short: nn.Module | None = None) -> None:
        super().__init__()
        names = (f"branch2{letter}" for letter in "abc")
        self.convs = nn.Sequential(OrderedDict(zip(names, layers, strict=False)))
        self.short, self.relu = nn.Identity() if short is None else short, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs(x) + self.short(x))


@stands_for("kornia.models.rt_detr.architecture.resnet_d.BasicBlockD")
class BasicBlockD(BlockD):
    pass


@stands_for("kornia.models.rt_detr.architecture.resnet_d.BottleneckD")
class BottleneckD(BlockD):
    pass


def bottleneck(channels: int, out: int, stride: int, short: nn.Module | None) -> nn.Module:
    layers = [ConvNormAct(channels, 4, 1), ConvNormAct(4, 4, 3, stride), ConvNormAct(4, out, 1, act=False)]
    return BottleneckD(layers, short)


def test_a_model_trains_as_eager() -> None:
    torch.manual_seed(0)
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    pooled = nn.Sequential(OrderedDict(pool=pool, conv=ConvNormAct(12, 16, 1, act=False)))
    model = nn.Sequential(
        BasicBlock(8, 8),
        BasicBlock(8, 12, 2),
        BasicBlockD([ConvNormAct(12, 12, 3), ConvNormAct(12, 12, 3, act=False)]),
        bottleneck(12, 16, 2, pooled),
        bottleneck(16, 12, 1, ConvNormAct(16, 12, 1, act=False)),
    )
    assert_trains_as_eager(settled(model), pictures())
    rows = explain(fuse(model))
    assert {row.backend for row in rows} == {"native"}
    assert [len(block.fused_describe().calls) for block in model] == [1, 1, 1, 2, 1]


def test_parts_without_a_fused_form_are_named() -> None:
    block = BasicBlockD([ConvNormAct(8, 8, 3), conv(8, 8, 3)])
    assert "convs.branch2b is Conv2d; accepted: ConvNormAct" in str(why_not(block))
    block = bottleneck(8, 8, 1, nn.Sequential(nn.AvgPool2d(2), nn.Dropout(), conv(8, 8, 1)))
    assert "short is Sequential(AvgPool2d, Dropout, Conv2d)" in str(why_not(block))
