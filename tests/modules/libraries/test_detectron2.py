"""detectron2's ResNet, by stand-ins."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.stand_ins import pictures, settled, stands_for
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not


@stands_for("detectron2.layers.wrappers.Conv2d")
class Conv2d(nn.Conv2d):
    def __init__(self, *args: int, norm: nn.Module | None = None, activation: object = None, **kwargs: object) -> None:
        super().__init__(*args, bias=False, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        y = y if self.norm is None else self.norm(y)
        return y if self.activation is None else self.activation(y)


@stands_for("detectron2.layers.batch_norm.FrozenBatchNorm2d")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class Block(nn.Module):
    convs = 2

    def __init__(self, channels: int, out: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.shortcut = Conv2d(channels, out, 1, 2, norm=norm(out)) if channels != out else None
        stride = 1 if channels == out else 2
        self.make(channels, out, stride, norm)

    def make(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        self.conv1 = Conv2d(channels, out, 3, stride, 1, norm=norm(out))
        self.conv2 = Conv2d(out, out, 3, 1, 1, norm=norm(out))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.convs + 1):
            out = getattr(self, f"conv{i}")(F.relu_(out) if i > 1 else out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


@stands_for("detectron2.modeling.backbone.resnet.BasicBlock")
class BasicBlock(Block):
    pass


@stands_for("detectron2.modeling.backbone.resnet.BottleneckBlock")
class BottleneckBlock(Block):
    """With a dilation, and the stride in the first convolution."""

    convs = 3

    def make(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        self.conv1 = Conv2d(channels, 8, 1, stride, norm=norm(8))
        self.conv2 = Conv2d(8, 8, 3, 1, 2, 2, groups=2, norm=norm(8))
        self.conv3 = Conv2d(8, out, 1, norm=norm(out))


@stands_for("detectron2.modeling.backbone.resnet.DeformBottleneckBlock")
class DeformBottleneckBlock(BottleneckBlock):
    pass


@stands_for("detectron2.modeling.backbone.resnet.BasicStem")
class BasicStem(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, 8, 7, 2, 3, norm=norm(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), 3, 2, 1)


def small(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return settled(
        nn.Sequential(
            BasicStem(norm), BasicBlock(8, 8, norm), BasicBlock(8, 16, norm), BottleneckBlock(16, 16, norm),
            BottleneckBlock(16, 24, norm),
        )
    )  # fmt: skip


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d], ids=["batch norm", "frozen"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_model_trains_as_eager(norm: Callable[[int], nn.Module], autocast: torch.dtype | None) -> None:
    model = small(norm)
    assert_trains_as_eager(model, pictures(3, 33), autocast=autocast)
    rows = explain(fuse(model))
    assert [row.block for row in rows] == ["BasicStem"] + ["BasicBlock"] * 2 + ["BottleneckBlock"] * 2
    assert {row.backend for row in rows} == {"native"}
    assert [len(block.fused_describe().calls) for block in model] == [1] * 5


def test_two_activations_behind_one_convolution_are_refused() -> None:
    block = BasicBlock(8, 8)
    block.conv2.activation = nn.SiLU()
    assert "stages[1].conv has an activation, SiLU, and another follows it" in str(why_not(block))


def with_padding(block: Block) -> None:
    block.conv1.padding_mode = "reflect"


def with_layer_norm(block: Block) -> None:
    block.conv1.norm = nn.GroupNorm(1, 8)


def with_a_hook(block: Block) -> None:
    block.conv1.norm.register_forward_hook(lambda *_: None)


REFUSED = {
    "padding": (with_padding, "stages[0].conv pads with zeros though padding_mode is 'reflect'"),
    "norm": (with_layer_norm, "stages[0].norm is GroupNorm"),
    "hook": (with_a_hook, "stages[0].norm (BatchNorm2d) has hooks"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_fused_block_that_changes_runs_its_own_forward(change: Callable[[Block], None], reason: str) -> None:
    block = settled(BasicBlock(8, 8))
    fused = fuse(copy.deepcopy(block))
    for each in (block, fused):
        change(each)
    assert torch.equal(fused(pictures()), block(pictures()))
    (row,) = explain(fused)
    assert row.backend == "eager" and reason in row.reason


def test_deformable_convolutions_are_refused() -> None:
    assert "conv2 is Conv2d, which reads its input at learned offsets" in str(why_not(DeformBottleneckBlock(8, 8)))
