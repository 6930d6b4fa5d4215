"""The formula against blocks written as modules, the way the papers and torchvision write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.matrix import BACKENDS
from torch import Tensor, nn

from resnet_fused.functional import conv_bn_act
from resnet_fused.functional import residual_block as fused
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import BlockSpec, StageSpec


class BasicBlock(nn.Module):
    """torchvision's: two 3x3, the stride on the first."""

    def __init__(self, channels: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample(channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return torch.relu(out)


class Bottleneck(nn.Module):
    """torchvision's, v1.5: 1x1, 3x3 with stride, dilation and groups, 1x1."""

    def __init__(self, channels: int, width: int, planes: int, stride: int = 1, dilation: int = 1, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.downsample = downsample(channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return torch.relu(out)


class PreActBottleneck(nn.Module):
    """He et al. 2016: norm and ReLU before each convolution; the shortcut reads the activated input."""

    def __init__(self, channels: int, width: int, planes: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes, 1, bias=False)
        changes = stride != 1 or channels != planes
        self.shortcut = nn.Conv2d(channels, planes, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(torch.relu(self.bn2(out)))
        return self.conv3(torch.relu(self.bn3(out))) + shortcut


class Branch(nn.Module):
    """conv, norm, ReLU, conv, norm: the F(x) of the scaled residuals below; the second norm may be left out."""

    def __init__(self, channels: int, last_norm: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=True)
        self.bn1 = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
        self.conv2 = nn.Conv2d(6, channels, 3, padding=1, bias=True)
        self.bn2 = nn.BatchNorm2d(channels) if last_norm else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return out if self.bn2 is None else self.bn2(out)


def downsample(channels: int, planes: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == planes:
        return None
    return nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def tensors_of(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> StageParams:
    if bn is None:
        return StageParams(conv.weight, conv.bias)
    return StageParams(
        conv.weight,
        conv.bias,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bn.num_batches_tracked,
        bn.momentum,
    )


def stage_of(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, act: str = "relu") -> StageSpec:
    return StageSpec(
        conv.stride,
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,
        conv.groups,
        norm=bn is not None,
        batch_stats=bn is not None and bn.training,
        eps=1e-5 if bn is None else bn.eps,
        act=act,  # type: ignore[arg-type]
    )


def chain(*pairs: tuple[nn.Conv2d, nn.BatchNorm2d | None], last_act: str = "relu") -> tuple:
    acts = ["relu"] * (len(pairs) - 1) + [last_act]
    specs = tuple(stage_of(conv, bn, act) for (conv, bn), act in zip(pairs, acts, strict=True))
    return specs, tuple(tensors_of(conv, bn) for conv, bn in pairs)


def post_activation(module: BasicBlock | Bottleneck) -> tuple[BlockParams, BlockSpec]:
    pairs = [(module.conv1, module.bn1), (module.conv2, module.bn2)]
    if isinstance(module, Bottleneck):
        pairs.append((module.conv3, module.bn3))
    specs, tensors = chain(*pairs)
    if module.downsample is None:
        return BlockParams(tensors), BlockSpec(specs, "identity")
    conv, bn = module.downsample
    return BlockParams(tensors, tensors_of(conv, bn)), BlockSpec(specs, "projection", stage_of(conv, bn, "identity"))


def pre_activation(module: PreActBottleneck) -> tuple[BlockParams, BlockSpec]:
    specs, tensors = chain((module.conv1, module.bn1), (module.conv2, module.bn2), (module.conv3, module.bn3))
    if module.shortcut is None:
        return BlockParams(tensors), BlockSpec(specs, "identity", order="pre")
    projection = tensors_of(module.shortcut, None)
    return (
        BlockParams(tensors, projection),
        BlockSpec(specs, "projection", stage_of(module.shortcut, None, "identity"), order="pre"),
    )


def scaled(module: Branch, branch_scale: Scale, skip_scale: Scale, act: str) -> tuple[BlockParams, BlockSpec]:
    specs, tensors = chain((module.conv1, module.bn1), (module.conv2, module.bn2), last_act=act)
    return BlockParams(tensors, None, branch_scale, skip_scale), BlockSpec(specs, "identity")


def random_affine(module: nn.Module, seed: int) -> nn.Module:
    """Every norm away from its initial weight 1, bias 0, mean 0, variance 1, where mistakes would not show."""
    torch.manual_seed(seed)
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.normal_(bn.weight, 0.3, 1.0)
            nn.init.normal_(bn.bias)
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2.0)
    return module


def assert_same(
    module: nn.Module,
    expected: Callable[[Tensor], Tensor],
    block: Callable[[Tensor], Tensor],
    extra: tuple[Tensor, ...] = (),
) -> None:
    """Output, every gradient and every buffer of `module`, run as written and run as a block."""
    x = torch.randn(3, 8, 7, 5, dtype=torch.float64, requires_grad=True)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    out = expected(x)
    dout = torch.randn_like(out)
    inputs = [x, *module.parameters(), *extra]
    grads = torch.autograd.grad(out, inputs, dout)
    buffers_after = {name: b.clone() for name, b in module.named_buffers()}
    module.load_state_dict(buffers, strict=False)

    got = block(x)
    torch.testing.assert_close(got, out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, dout), grads, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(module.named_buffers()), buffers_after, rtol=1e-12, atol=1e-12)


backends = pytest.mark.parametrize("backend", ["eager", *BACKENDS])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@backends
@modes
@pytest.mark.parametrize(("planes", "stride"), [(8, 1), (12, 1), (8, 2)])
def test_basic_block(backend: str, training: bool, planes: int, stride: int) -> None:
    module = random_affine(BasicBlock(8, planes, stride).double(), 0).train(training)
    assert_same(module, module, lambda x: fused(x, *post_activation(module), backend=backend))


@backends
@modes
@pytest.mark.parametrize(
    ("planes", "stride", "dilation", "groups"),
    [(8, 1, 1, 1), (12, 1, 1, 1), (12, 2, 1, 1), (8, 1, 2, 3), (16, 2, 1, 6)],
)
def test_bottleneck(backend: str, training: bool, planes: int, stride: int, dilation: int, groups: int) -> None:
    module = random_affine(Bottleneck(8, 6, planes, stride, dilation, groups).double(), 1).train(training)
    assert_same(module, module, lambda x: fused(x, *post_activation(module), backend=backend))


@backends
@modes
@pytest.mark.parametrize(("planes", "stride"), [(8, 1), (12, 1), (12, 2)])
def test_pre_activation(backend: str, training: bool, planes: int, stride: int) -> None:
    module = random_affine(PreActBottleneck(8, 4, planes, stride).double(), 2).train(training)
    assert_same(module, module, lambda x: fused(x, *pre_activation(module), backend=backend))


@backends
def test_frozen_norms_inside_training(backend: str) -> None:
    """Detection's fine-tuning: some norms in eval() while the block trains."""
    module = random_affine(Bottleneck(8, 6, 12, 2).double(), 3).train()
    module.bn1.eval()
    module.downsample[1].eval()
    assert_same(module, module, lambda x: fused(x, *post_activation(module), backend=backend))


@backends
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_rezero(backend: str, alpha: float) -> None:
    """Bachlechner et al. 2020: x + alpha F(x), alpha starting at 0 and receiving its gradient there."""
    module = random_affine(Branch(8).double(), 4).train()
    scale = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert_same(
        module,
        lambda x: x + scale * module(x),
        lambda x: fused(x, *scaled(module, scale, 1.0, "identity"), backend=backend),
        extra=(scale,),
    )


@backends
def test_scaled_residual(backend: str) -> None:
    """relu((1 - beta) x + alpha F(x)) with fixed scales."""
    module = random_affine(Branch(8).double(), 5).train()
    assert_same(
        module,
        lambda x: torch.relu(0.75 * x + 0.3 * module(x)),
        lambda x: fused(x, *scaled(module, 0.3, 0.75, "relu"), backend=backend),
    )


@backends
def test_layer_scale(backend: str) -> None:
    """One learnable factor per channel on the branch and on the skip path."""
    module = random_affine(Branch(8).double(), 6).train()
    alpha = torch.randn(8, 1, 1, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert_same(
        module,
        lambda x: torch.relu(alpha * module(x) + beta.view(-1, 1, 1) * x),
        lambda x: fused(x, *scaled(module, alpha, beta, "relu"), backend=backend),
        extra=(alpha, beta),
    )


@backends
def test_euler_step(backend: str) -> None:
    """x + h F(x): a forward-Euler step of dx/dt = F(x), F ending in a convolution without norm."""
    module = random_affine(Branch(8, last_norm=False).double(), 7).train()
    assert_same(
        module,
        lambda x: x + 0.1 * module(x),
        lambda x: fused(x, *scaled(module, 0.1, 1.0, "identity"), backend=backend),
    )


@backends
@modes
def test_stem(backend: str, training: bool) -> None:
    """ResNet's 7x7 stride 2, through `conv_bn_act`."""
    conv, bn = nn.Conv2d(8, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6, momentum=None)
    module = random_affine(nn.Sequential(conv, bn).double(), 8).train(training)
    assert_same(
        module,
        lambda x: torch.relu(module(x)),
        lambda x: conv_bn_act(x, tensors_of(conv, bn), stage_of(conv, bn), backend=backend),
    )
