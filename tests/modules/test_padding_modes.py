"""A model whose convolutions pad by the picture's own values fuses, and computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from support.padding import MODES
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models
from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import BlockModules, StageModules, describe
from resnet_fused.spec import PaddingMode

modes = pytest.mark.parametrize("mode", MODES)


class OnATorus(nn.Module):
    """A small ResNet of a user: every convolution with a window, the stem's too, pads by `mode`."""

    def __init__(self, mode: PaddingMode) -> None:
        super().__init__()
        net = models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=3)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = mode
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = model(x)
    return out, list(torch.autograd.grad(out.square().sum(), list(model.parameters())))


@modes
def test_a_model_fuses(mode: PaddingMode) -> None:
    """Training's outputs, gradients and statistics, then evaluation's outputs; fp64, so what is left is rounding."""
    torch.manual_seed(0)
    eager = OnATorus(mode).double()
    fused = resnet_fused.fuse(copy.deepcopy(eager), backend="native")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    rows = [row for row in resnet_fused.explain(fused) if row.backend != "native"]
    assert not rows
    for (ours, our_grads), (theirs, their_grads) in [(step(fused, x), step(eager, x))]:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(our_grads, their_grads, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), eager.eval()(x), rtol=1e-9, atol=1e-9)


@modes
def test_a_mode_that_changes_is_seen(mode: PaddingMode) -> None:
    model = resnet_fused.fuse(models.resnet18(num_classes=3).eval())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        model.layer1[0].conv2.padding_mode = mode
        after = model(x)
        model.layer1[0].conv2.padding_mode = "zeros"
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not torch.allclose(before, after)


@modes
def test_same_padding_has_a_side_for_each_pixel(mode: PaddingMode) -> None:
    """nn.Conv2d pads an even kernel more on one side, in every mode; the spec has one number for both."""

    def of(kernel: int) -> BlockModules:
        conv = nn.Conv2d(2, 2, kernel, padding="same", padding_mode=mode)
        return BlockModules((StageModules(conv, None, None),), "none")

    _, spec = describe(of(5), "default")
    assert spec.stages[0].padding == (2, 2) and spec.stages[0].padding_mode == mode
    with pytest.raises(NotFusable, match="padding='same' with an even kernel"):
        describe(of(4), "default")


@modes
def test_compiles(mode: PaddingMode) -> None:
    """Fakes give the real sizes and strides, so a compiled block computes what the block does."""
    torch.manual_seed(0)
    block = resnet_fused.fuse(nn.Sequential(models.BasicBlock(4, 4)).double())
    block[0].conv1.padding_mode = mode
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager")
    torch.testing.assert_close(step(compiled, x), step(block, x), rtol=1e-10, atol=1e-10)
