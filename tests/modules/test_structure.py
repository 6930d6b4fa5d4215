"""Blocks as users write them, of classes that nobody knows: matched by structure, they compute what they computed."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import library_blocks
from support.training import assert_trains_as_eager
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.structure import FusedByStructure, fused
from resnet_fused.testing import assert_equivalent


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


class DropPath(nn.Module):
    """Stochastic depth, as timm's users write it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) + 0.7
        return x.div(0.7) * mask.floor()


class Dropped(CifarBlock):
    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(self.drop_path(out) + self.shortcut(x))


class Split(CifarBlock):
    """Res2Net's: a half is convolved, the other handed on."""

    def __init__(self) -> None:
        super().__init__(8, 16, 1)
        self.inner, self.norm = conv(8, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        first, second = torch.chunk(out, 2, 1)
        out = torch.cat((F.relu(self.norm(self.inner(first))), second), 1)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Darknet(nn.Module):
    """Its last activation stands before the sum, which is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(8, 4, 1), nn.BatchNorm2d(4), conv(4, 8), nn.BatchNorm2d(8)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        out += x
        return out


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
    "stochastic depth": (Dropped, "15 operations beside (conv3x3+bn+relu → conv3x3+bn)"),
    "split": (Split, "conv3x3+bn+relu → chunk+getitem+getitem+(conv3x3+bn+relu)+cat → conv3x3+bn, + conv1x1+bn, relu"),
    "optional arguments": (
        Optional,
        "conv3x3+bn+relu → conv3x3+bn, + conv1x1+bn, relu (given more than x, its own forward runs)",
    ),
    "added to an activation in place": (Darknet, "conv1x1+bn+silu → conv3x3+bn+silu, + x"),
}


def picture(block: nn.Module, n: int = 4, size: int = 9) -> Tensor:
    """Of an odd size: of 10 pixels oneDNN 3.12 by AVX2 computes a strided 1x1 weight's gradient out of bounds."""
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


made = partial(library_blocks.made, drop=True)


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


@pytest.mark.parametrize("name", ["squeeze-excitation by hand", "scaled by channel", "a leading norm, identity"])
def test_under_autocast(name: str) -> None:
    """Smooth ones: a ReLU's flips are chance."""
    model = made(BLOCKS[name][0])
    assert_trains_as_eager(model, picture(model), autocast=torch.bfloat16, match="structure")


@pytest.mark.parametrize("name", ["option A", "squeeze-excitation", "three paths"])
def test_in_the_other_memory_format(name: str) -> None:
    model = made(BLOCKS[name][0]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = picture(model).contiguous(memory_format=torch.channels_last)
    assert_trains_as_eager(model, x, memory="low", match="structure")
    assert by_structure(model)(x).is_contiguous(memory_format=torch.channels_last)


class ResNet20(nn.Module):
    """Three blocks of each of three widths, as in the paper, with a shortcut without parameters; a quarter as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        blocks: list[nn.Module] = []
        for width in (4, 8, 16):
            for i in range(3):
                narrows = i == 0 and width > 4
                block = CifarBlock(width // 2 if narrows else width, width, 2 if narrows else 1)
                if narrows:
                    block.shortcut = Lambda(self.pads(width // 4))  # type: ignore[assignment]
                blocks.append(block)
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(16, 5)

    @staticmethod
    def pads(width: int) -> Callable[[Tensor], Tensor]:
        return lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, width, width), "constant", 0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def test_a_whole_network_trains_as_its_twin() -> None:
    torch.manual_seed(0)
    model = ResNet20()
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_trains_as_eager(model, x, steps=3, match="structure")
    assert explain(by_structure(model)).summary == "9 of 9 blocks fused"


def test_verify_takes_the_match() -> None:
    model = nn.Sequential(made(CifarBlock)[0], made(lambda: PreActivated(8, 8, 1))[0])
    assert_equivalent(model, picture(model), seeds=2, match="structure", min_fused=1.0)
    assert_equivalent(by_structure(model), picture(model), seeds=1, train=False, min_fused=1.0)


# --- what is proven, and what is refused ------------------------------------------------------------------------------


class OtherOutput(CifarBlock):
    """No tensor is seen in a trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.001 if torch.is_tensor(x) else 1)


class OtherGradient(CifarBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if torch.is_tensor(out):
            out.register_hook(lambda gradient: 1.001 * gradient)
        return out


class OtherStatistics(CifarBlock):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_tensor(x):
            self.bn1(self.conv1(x))
        return super().forward(x)


LIES = {
    OtherOutput: "the proof of its match failed: output differs by 0.001 of its largest value",
    OtherGradient: "the proof of its match failed: gradient of the input differs by 0.001 of its largest value",
}


@pytest.mark.parametrize("cls", LIES)
def test_the_proof_catches_what_a_trace_cannot_see(cls: type[nn.Module]) -> None:
    assert reason(cls()) == LIES[cls]


def test_a_match_that_fails_in_one_mode_runs_unfused_there() -> None:
    """Only training shows that statistics are gathered twice."""
    model = by_structure(nn.Sequential(OtherStatistics()).train())
    (row,) = explain(model)
    assert row.backend == "eager"
    assert row.reason.startswith("the proof of its match failed: bn1.running_mean differs by ")
    (row,) = explain(model.eval())
    assert row.backend == "native" and row.reason.startswith("matched by structure: ")
    assert_trains_as_eager(model.train(), picture(model), match="structure")


def given(forward: Callable[..., Any]) -> nn.Module:
    """A block with another forward."""
    return type("Given", (CifarBlock,), {"forward": forward})()


def plus(block: Any, x: Tensor) -> Tensor:
    return CifarBlock.forward(block, x) + block.shortcut(x)


def by_value(block: Any, x: Tensor) -> Tensor:
    return plus(block, x) if x.mean() > 0 else CifarBlock.forward(block, x)


def by_chance(block: Any, x: Tensor) -> Tensor:
    return plus(block, x) if random.random() < 0.5 else CifarBlock.forward(block, x)


def by_torch_chance(block: Any, x: Tensor) -> Tensor:
    return CifarBlock.forward(block, x) + block.shortcut(x) * torch.rand(())


def remembers(block: Any, x: Tensor) -> Tensor:
    block.last = plus(block, x)
    return block.last


def counts(block: Any, x: Tensor) -> Tensor:
    block.bn1.num_batches_tracked.add_(1)
    return plus(block, x)


def makes(block: Any, x: Tensor) -> Tensor:
    return CifarBlock.forward(block, x) + block.shortcut(x) * torch.ones(1)


def casts(block: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plus(block, x)


def stops(block: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        skip = block.shortcut(x)
    return CifarBlock.forward(block, x) + skip


def two(block: Any, x: Tensor, y: Tensor) -> Tensor:
    return CifarBlock.forward(block, x) + y


def returns_two(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return plus(block, x), x


def writes_input(block: Any, x: Tensor) -> Tensor:
    return block.bn1(block.conv1(F.relu_(x))) + block.shortcut(x)


def reads_again(block: Any, x: Tensor) -> Tensor:
    skip = block.bn1(block.conv1(x))
    out = F.relu(skip, inplace=True)
    return block.bn2(block.conv2(out)) + skip


def ignores(block: Any, x: Tensor) -> Tensor:
    block.bn1(CifarBlock.forward(block, x))
    return plus(block, x)


def repeats(block: Any, x: Tensor) -> Tensor:
    return block.bn1(block.conv1(x)) + block.bn1(block.conv1(torch.relu(x)))


REFUSED: dict[Callable[..., Any], str] = {
    by_value: "its forward cannot be traced: symbolically traced variables cannot be used as inputs to control flow",
    by_chance: "its forward draws random numbers of its own, which no graph holds",
    by_torch_chance: "its forward draws random numbers of its own, which no graph holds",
    remembers: "its forward writes to self.last",
    counts: "its forward calls add_ and does not use what it gives",
    makes: "its forward makes a tensor of its own, or uses one that is no parameter or buffer",
    casts: "its forward switches autocast, autograd or what autograd saves, which no graph holds",
    stops: "its forward switches autocast, autograd or what autograd saves, which no graph holds",
    two: "its forward does not take one tensor; accepted: forward(x), others by default",
    returns_two: "its forward does not return one tensor",
    writes_input: "relu_ writes to a value that is read again",
    reads_again: "relu writes to a value that is read again",
    ignores: "its forward calls bn1 and does not use what it gives",
    repeats: "it has no convolution with a batch norm beside it, each called once, that nothing else reads",
}


@pytest.mark.parametrize("forward", REFUSED)
def test_refused_in_words(forward: Callable[..., Any]) -> None:
    assert reason(given(forward)) == REFUSED[forward]


def test_refused_for_what_it_is() -> None:
    replaced = CifarBlock()
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert reason(replaced) == "its forward is replaced on the instance"
    with torch.device("meta"):
        absent = CifarBlock()
    assert reason(absent) == "its tensors are on the meta device: no match can be proven before they have values"
    historic = CifarBlock()
    historic.twice = historic.conv1.weight * 2  # type: ignore[assignment]
    assert reason(historic).startswith("it cannot be copied, so it cannot be traced: Only Tensors created explicitly")


def test_without_a_batch_norm_there_is_no_block() -> None:
    class Fixup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.scale = conv(4, 4), conv(4, 4), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv2(F.relu(self.conv1(x))) * self.scale + x)

    with pytest.warns(UserWarning, match="fuse found no block"):
        assert not explain(by_structure(nn.Sequential(Fixup())))


class ConvNormReLU(nn.Module):
    def __init__(self, channels: int, out: int, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, out, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Undecided(nn.Module):
    """A block whose parts can be fused, but not itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNormReLU(4, 4), ConvNormReLU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + (x if x.sum() > 0 else -x)


def test_what_a_refused_block_holds_is_fused_by_itself() -> None:
    model = by_structure(made(Undecided))
    rows = {row.name: (row.block, row.backend) for row in explain(model)}
    assert rows == {
        "0": ("Undecided", "eager"),
        "0.first": ("ConvNormReLU", "native"),
        "0.second": ("ConvNormReLU", "native"),
    }
    assert_trains_as_eager(model, picture(model), match="structure")


def test_a_layer_alone_needs_a_gain() -> None:
    assert reason(ConvNormReLU(4, 4, groups=4)).startswith("a layer on its own is faster in PyTorch")


def test_parts_of_a_library_are_seen_through() -> None:
    """They are fused by themselves, until the block around them is matched."""
    torchvision = pytest.importorskip("torchvision")

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torchvision.ops.Conv2dNormActivation
            self.first, self.second = layer(4, 4), layer(4, 4, activation_layer=None)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.second(self.first(x)) + x)

    model = fuse(made(Parts))
    assert isinstance(model[0].first, FusedModule) and not isinstance(model[0], FusedModule)
    assert explain(by_structure(model))[0].reason == "matched by structure: conv3x3+bn+relu → conv3x3+bn, + x, relu"
    assert_trains_as_eager(model, picture(model), match="structure")


# --- a fused block stays the module that it was -----------------------------------------------------------------------


def test_fusing_leaves_everything_as_it_was() -> None:
    model = made(lambda: WideBlock(drop=0.3)).eval()
    model[0].bn1.train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    by_structure(model)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    unfuse(model)
    assert type(model[0]) is WideBlock and not any(name.startswith("_fused") for name in vars(model[0]))


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the blocks that are traced."""
    seen: list[str] = []
    original = fused._derive

    def note(block: nn.Module) -> Any:
        seen.append(type(block).__name__)
        return original(block)

    monkeypatch.setattr(fused, "_derive", note)
    return seen


def test_traced_once_for_each_mode(derived: list[str]) -> None:
    """And once for blocks that are alike; copies know it, pickles do not."""
    model = by_structure(nn.Sequential(CifarBlock(8, 8, 1), CifarBlock(8, 8, 1)))
    assert derived == ["CifarBlock"] * 2
    x = picture(model)
    for mode in (True, False, True):
        copy.deepcopy(model.train(mode))(x)
        model(x)
    model.double().float().load_state_dict(model.state_dict())
    model(x)
    assert derived == ["CifarBlock"] * 2
    restored = pickle.loads(pickle.dumps(model.eval()))
    torch.testing.assert_close(restored(x), model(x))
    assert derived[2:] == ["FusedCifarBlock"] * 2


class Configured(CifarBlock):
    """Its forward reads attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.scale, self.sizes, self.residual = 1.0, [1], True

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(self.act(self.bn1(self.conv1(x))))
        for _ in self.sizes:
            out = out * self.scale
        out = self.bn2(self.conv2(out))
        return self.act(out + self.shortcut(x) if self.residual else out)


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda m: setattr(m, "scale", -0.5),
    "a flag": lambda m: setattr(m, "residual", False),
    "a list in place": lambda m: [setattr(m, "scale", -0.5), m.sizes.append(2)],
    "an activation": lambda m: setattr(m, "act", nn.SiLU()),
    "an unknown activation": lambda m: setattr(m, "act", nn.Tanh()),
    "a shortcut": lambda m: setattr(m, "shortcut", nn.Conv2d(4, 8, 1, 2)),
    "a hook": lambda m: m.bn1.register_forward_hook(lambda _, __, out: out * 2),
    "a hook on the shortcut": lambda m: m.shortcut.register_forward_hook(lambda _, __, out: out * 2),
    "a norm's mode": lambda m: m.bn2.train(not m.bn2.training),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "a subclass": lambda m: setattr(m.bn2, "__class__", Doubled),
    "a parametrization": lambda m: parametrizations.spectral_norm(m.conv1),
    "a replaced forward": lambda m: setattr(m.bn1, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen_at_the_next_call(name: str, train: bool) -> None:
    eager = made(Configured)[0].double().train(train)
    block = by_structure(copy.deepcopy(eager))
    x = picture(eager).double()
    torch.testing.assert_close(block(x), eager(x))
    before = copy.deepcopy(block)(x)
    for module in (eager, block):
        torch.manual_seed(2)
        CHANGES[name](module)
        module.double()
    for _ in range(2):
        expected, got = (module(x.clone()) for module in (eager, block))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, got), "the change changes nothing"
    torch.testing.assert_close(block.state_dict(), eager.state_dict(), rtol=1e-10, atol=1e-10)


def test_hooks_run() -> None:
    """Those of a part, which is then called as it is, and the block's own."""
    model = by_structure(made(lambda: CifarBottleneck(8, 4, 1)))
    seen: list[str] = []
    for name in ("", "conv3"):
        model[0].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(picture(model))
    assert seen == ["conv3", ""]
    words = "(conv1x1+bn+relu → conv3x3+bn+relu)+Conv2d+BatchNorm2d+add+relu"
    assert explain(model)[0].reason.startswith(f"matched by structure: {words}; one fused call beside")


def test_other_arguments_run_the_blocks_own_forward() -> None:
    eager = made(Optional)[0].eval()
    block = by_structure(copy.deepcopy(eager))
    x, one = picture(eager), torch.ones(())
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {}), ((x, one), {}), ((), {"inputs": x})]
    for args, named in (*calls, ((x,), {"shift": one})):
        torch.testing.assert_close(block(*args, **named), eager(*args, **named))


def test_a_shallow_copy_uses_its_own_parts() -> None:
    """As nn.DataParallel's replicas."""
    block = by_structure(made(OptionA)[0].eval())
    x = picture(block)
    expected = block(x)
    copied = copy.copy(block)
    copied._modules = {name: copy.deepcopy(child) for name, child in block._modules.items()}
    nn.init.zeros_(copied.conv1.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.allclose(copied(x), expected)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(copied(x), unfuse(copy.deepcopy(copied))(x))


def graph_of(model: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """The compiled model's result, and the code of its graphs."""
    code: list[str] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        code.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)(x), "".join(code)


def test_compiled_whole() -> None:
    """A block with a gate, and one with a fused call among operations."""
    eager = nn.Sequential(*(made(BLOCKS[name][0])[0] for name in ("squeeze-excitation", "split"))).eval()
    model = by_structure(copy.deepcopy(eager))
    x = picture(eager)
    got, code = graph_of(model, x)
    torch.testing.assert_close(got, eager(x))
    assert "torch.ops.resnet_fused" in code and "torch.batch_norm" not in code


def test_compiled_after_a_change() -> None:
    eager = made(Configured).eval()
    model = by_structure(copy.deepcopy(eager))
    x = picture(eager)
    assert "torch.ops.resnet_fused" in graph_of(model, x)[1]
    for each in (eager, model):
        each[0].residual = False
    got, code = graph_of(model, x)
    torch.testing.assert_close(got, eager(x))
    assert "torch.ops.resnet_fused" not in code, "it has not been traced in this state"
    model(x)
    got, code = graph_of(model, x)
    torch.testing.assert_close(got, eager(x))
    assert "torch.ops.resnet_fused" in code


def test_other_graphs_hold_the_unfused_model() -> None:
    eager = made(Excited).eval()
    model = by_structure(copy.deepcopy(eager))
    x = picture(eager)
    expected = eager(x)
    exported = torch.export.export(model, (x,))
    assert "resnet_fused" not in str(exported.graph)
    for graph in (exported.module(), torch.jit.trace(model, (x,)), fx.symbolic_trace(model)):
        torch.testing.assert_close(graph(x), expected)


def test_off_by_default_and_named_in_errors() -> None:
    with pytest.warns(UserWarning, match='match="structure" looks for its parts'):
        model = fuse(made(CifarBlock))
    assert type(model[0]) is CifarBlock
    with pytest.raises(ValueError, match="match must be one of 'class', 'structure', got 'shape'"):
        fuse(model, match="shape")  # type: ignore[arg-type]
    assert isinstance(fuse(by_structure(model), memory="low")[0], FusedByStructure), "fusing again keeps what was found"
    assert model[0]._fused_settings.memory == "low"
