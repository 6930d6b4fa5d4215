"""The blocks of Ultralytics' YOLO and RT-DETR, by stand-ins."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.stand_ins import conv, pictures, settled, stands_for
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not
from resnet_fused.testing import assert_equivalent


@stands_for("ultralytics.nn.modules.conv.Conv")
class Conv(nn.Module):
    shared = nn.SiLU()

    def __init__(self, channels: int, out: int, size: int = 1, stride: int = 1, act: nn.Module | bool = True) -> None:
        super().__init__()
        self.conv, self.bn = conv(channels, out, size, stride), nn.BatchNorm2d(out)
        self.act = act if isinstance(act, nn.Module) else self.shared if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def folded(self) -> None:
        """What Ultralytics' fuse() makes of it."""
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        del self.bn
        self.forward = self.forward_fuse  # type: ignore[method-assign]


@stands_for("ultralytics.nn.modules.conv.RepConv")
class RepConv(nn.Module):
    def __init__(self, channels: int, out: int, bn: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, out, 3, act=False), Conv(channels, out, act=False)
        self.bn = nn.BatchNorm2d(out) if bn else None
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x) + (0 if self.bn is None else self.bn(x)))


class Residual(nn.Module):
    def __init__(self, cv1: nn.Module, cv2: nn.Module, add: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = cv1, cv2, add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


@stands_for("ultralytics.nn.modules.block.Bottleneck")
class Bottleneck(Residual):
    pass


@stands_for("ultralytics.nn.modules.block.RepBottleneck")
class RepBottleneck(Residual):
    pass


@stands_for("ultralytics.nn.modules.block.ResNetBlock")
class ResNetBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * width
        self.cv1, self.cv2, self.cv3 = (
            Conv(channels, width), Conv(width, width, 3, stride), Conv(width, out, act=False),
        )  # fmt: skip
        alike = stride == 1 and channels == out
        self.shortcut = nn.Identity() if alike else nn.Sequential(Conv(channels, out, 1, stride, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.cv3(self.cv2(self.cv1(x))) + self.shortcut(x))


class C2f(nn.Module):
    """It calls its bottlenecks on halves of the channels, so the first one's input has the strides of a slice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1, self.cv2 = Conv(channels, channels), Conv(3 * half, channels)
        self.m = nn.ModuleList([Bottleneck(Conv(half, half, 3), Conv(half, half, 3))])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts += [bottleneck(parts[-1]) for bottleneck in self.m]
        return self.cv2(torch.cat(parts, 1))


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {  # with the number of fused blocks
    "YOLO's bottleneck": (
        lambda: [
            Bottleneck(Conv(8, 4), Conv(4, 8, 3)),
            Bottleneck(Conv(8, 8, 3), Conv(8, 12, 3, act=nn.LeakyReLU(0.1)), add=False),
        ],
        2,
    ),
    "C2f": (lambda: [C2f(8)], 1),
    "three branches": (lambda: [RepConv(8, 12), RepConv(12, 12, bn=True)], 2),
    "three branches in a bottleneck": (
        lambda: [RepBottleneck(RepConv(8, 4), Conv(4, 8, 3)), RepBottleneck(RepConv(8, 4), Conv(4, 6, 3), add=False)],
        4,
    ),
    "RT-DETR's ResNet": (lambda: [ResNetBlock(8, 4, 2), ResNetBlock(16, 4)], 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_eager(name: str) -> None:
    make, fused = MODELS[name]
    torch.manual_seed(0)
    model = settled(nn.Sequential(*make()))
    assert_trains_as_eager(model, pictures())
    rows = explain(fuse(model))
    assert [row.backend for row in rows if row.block != "Conv"] == ["native"] * fused
    assert all("a layer on its own is faster in PyTorch" in row.reason for row in rows if row.block == "Conv")


def test_a_layer_on_its_own_is_verified_with_its_activation() -> None:
    """Without it, which `verify` also compares, it would not be worth fusing."""
    assert_equivalent(settled(nn.Sequential(Conv(8, 8, 3, act=nn.ReLU()))), pictures(), seeds=1, min_fused=1.0)


def test_ultralytics_own_fusion() -> None:
    model = settled(nn.Sequential(Bottleneck(Conv(8, 4), Conv(4, 8, 3)))).eval()
    fused = fuse(copy.deepcopy(model))
    for each in (model, fused):
        for part in each.modules():
            if isinstance(part, Conv):
                part.folded()
    reason = "cv1 has no batch norm: Ultralytics' own fuse() has folded it into the convolution"
    assert reason in str(why_not(model[0]))
    assert "it has no batch norm" in str(why_not(model[0].cv2))
    (row,) = (row for row in explain(fused) if row.block == "Bottleneck")
    assert row.backend == "eager" and reason in row.reason
    with torch.no_grad():
        assert torch.equal(fused(pictures()), model(pictures()))


def activates(block: nn.Module) -> None:
    block.cv3.act = nn.SiLU()


def shortens(block: nn.Module) -> None:
    block.shortcut = Conv(8, 16, act=False)


def replaces(block: nn.Module) -> None:
    block.cv1 = nn.Conv2d(8, 4, 1)


REFUSED = {
    "activation before the addition": (activates, "cv3 has the activation SiLU"),
    "shortcut": (shortens, "shortcut is Conv; accepted: nn.Sequential of one Conv"),
    "layer": (replaces, "cv1 is Conv2d; accepted: Conv"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_parts_without_a_fused_form_are_named(change: Callable[[nn.Module], None], reason: str) -> None:
    block = ResNetBlock(8, 4)
    change(block)
    assert reason in str(why_not(block))
