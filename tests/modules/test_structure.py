"""Blocks as users write them, of classes that nobody knows: matched by structure, they compute what they computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.structure import FusedByStructure


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)


def shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    if channels == out and stride == 1:
        return nn.Sequential()
    return nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))


class CifarBlock(nn.Module):
    """As in the CIFAR models that everybody copies: functions for activations, an empty shortcut."""

    def __init__(self, channels: int = 4, out: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out), nn.BatchNorm2d(out)
        self.shortcut = shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarBottleneck(nn.Module):
    def __init__(self, channels: int = 4, width: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.downsample = shortcut(channels, 2 * width, stride) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn1(self.conv1(x)).relu_()
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        return torch.add(identity, out).relu()


class PreActivated(nn.Module):
    def __init__(self, channels: int = 4, out: int = 8, stride: int = 2, drop: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1, self.conv2 = conv(channels, out, 3, stride), conv(out, out)
        self.dropout = nn.Dropout(drop)
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        out += skip
        return out


class WideBlock(PreActivated):
    """Whose shortcut reads x itself, and which drops between its convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def option_a(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)


class OptionA(CifarBlock):
    """The first ResNet-20's: every second pixel, and channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = Lambda(option_a)


class FaceBlock(nn.Module):
    """IResNet's: a norm in front, PReLU in the middle, nothing behind the sum."""

    def __init__(self, channels: int = 4, out: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels, eps=1e-3), conv(channels, out)
        self.bn2, self.prelu = nn.BatchNorm2d(out, eps=1e-3), nn.PReLU(out)
        self.conv2, self.bn3 = conv(out, out, 3, stride), nn.BatchNorm2d(out, eps=1e-3)
        self.downsample = shortcut(channels, out, stride) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return out


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(inplace=True), nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Excited(CifarBlock):
    def __init__(self) -> None:
        super().__init__()
        self.se = SqueezeExcitation(8)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return F.relu(out + self.shortcut(x), inplace=True)


class ExcitedByHand(CifarBlock):
    """Squeeze-excitation as it stands in the CIFAR models, behind the last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.bn1(self.conv1(x)))
        out = F.silu(self.bn2(self.conv2(out)))
        w = out.mean((2, 3), keepdim=True)
        w = torch.sigmoid(self.fc2(F.relu(self.fc1(w))))
        out = out * w
        out += self.shortcut(x)
        return out


class Scaled(CifarBlock):
    """A constant on one side, a parameter of one value on the other."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        return F.leaky_relu(0.5 * x + self.alpha * self.bn2(self.conv2(out)), negative_slope=0.1)


class LayerScaled(CifarBlock):
    """A parameter for each channel, which under autocast widens what it multiplies."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = F.gelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(out)) * self.gamma


class DropsWhileTraining(CifarBlock):
    """Computes something else in training: a path of its own, and half of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.training:
            out = out * 0.5
        return F.relu(out + self.shortcut(x))


class ThreePaths(nn.Module):
    """A convolution of each kind and the identity's norm, added; RepVGG before it is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))
        self.point = nn.Sequential(conv(4, 4, 1), nn.BatchNorm2d(4))
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


class Optional(CifarBlock):
    """Takes more than x, if it is given."""

    def forward(self, inputs: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        out = F.relu(self.bn1(self.conv1(inputs)))
        out = self.bn2(self.conv2(out))
        if shift is not None:
            out = out + shift
        return F.relu(out + self.shortcut(inputs))


# name: (what makes it, what is found in training)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "basic": (CifarBlock, "conv3x3+bn+relu → conv3x3+bn, + conv1x1+bn, relu"),
    "basic, identity": (lambda: CifarBlock(8, 8, 1), "conv3x3+bn+relu → conv3x3+bn, + x, relu"),
    "bottleneck": (CifarBottleneck, "conv1x1+bn+relu → conv3x3+bn+relu → conv1x1+bn, + conv1x1+bn, relu"),
    "bottleneck, identity": (
        lambda: CifarBottleneck(8, 4, 1),
        "conv1x1+bn+relu → conv3x3+bn+relu → conv1x1+bn, + x, relu",
    ),
    "pre-activation": (PreActivated, "bn+relu+conv3x3 → bn+relu+conv3x3, + conv1x1"),
    "pre-activation, identity": (lambda: PreActivated(8, 8, 1), "bn+relu+conv3x3 → bn+relu+conv3x3, + x"),
    "wide": (
        lambda: WideBlock(drop=0.3, bias=True),
        "bn+relu+conv3x3 → Dropout → bn+relu+conv3x3, + Conv2d",
    ),
    "option A": (OptionA, "conv3x3+bn+relu → conv3x3+bn, + getitem+pad, relu"),
    "a leading norm": (FaceBlock, "BatchNorm2d → conv3x3+bn+prelu → conv3x3+bn, + conv1x1+bn"),
    "a leading norm, identity": (
        lambda: FaceBlock(8, 8, 1),
        "BatchNorm2d → conv3x3+bn+prelu → conv3x3+bn, + x",
    ),
    "squeeze-excitation": (Excited, "conv3x3+bn+relu → conv3x3+bn, * gate, + conv1x1+bn, relu"),
    "squeeze-excitation by hand": (ExcitedByHand, "conv3x3+bn+silu → conv3x3+bn+silu, * gate, + conv1x1+bn"),
    "scaled": (Scaled, "conv3x3+bn+leaky_relu → conv3x3+bn, * alpha, + x * 0.5, leaky_relu"),
    "scaled by channel": (LayerScaled, "conv3x3+bn+gelu → conv3x3+bn, * gamma, + x"),
    "another in training": (DropsWhileTraining, "conv3x3+bn+relu → conv3x3+bn, * 0.5, + conv1x1+bn, relu"),
    "three paths": (ThreePaths, "conv3x3+bn, + conv1x1+bn, + BatchNorm2d, relu"),
    "optional arguments": (Optional, "conv3x3+bn+relu → conv3x3+bn, + conv1x1+bn, relu"),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The block within a model, whose norms are away from one and zero."""
    torch.manual_seed(0)
    block = make()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    return nn.Sequential(block)


def picture(block: nn.Module, n: int = 4, size: int = 10) -> Tensor:
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def by_structure(model: nn.Module) -> nn.Module:
    return fuse(model, match="structure")


def reason(block: nn.Module) -> str:
    """Why it is left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = by_structure(nn.Sequential(block))
    assert not any(isinstance(module, FusedModule) for module in model.modules())
    (row,) = explain(model)
    assert row.backend == "eager"
    return row.reason.removeprefix("no match by structure: ")


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_as_users_write_them(name: str) -> None:
    make, words = BLOCKS[name]
    model = by_structure(made(make))
    assert isinstance(model[0], FusedByStructure)
    assert explain(model)[0].reason.split("; ")[0] == f"matched by structure: {words}"
    assert explain(model)[0].backend == "native"
    assert_trains_as_eager(model, picture(model), match="structure")
