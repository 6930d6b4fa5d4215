"""Activation checkpointing: blocks that are computed again, as far as autograd needs it, give what eager's give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.shared_blocks import Gated, SeveralCalls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused import fuse
from resnet_fused.models.resnet import BasicBlock, PreBasicBlock

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "two blocks": lambda: nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 6)),
    "pre-activation": lambda: PreBasicBlock(6, 6),
    "gated": Gated,
    "several calls": SeveralCalls,
}


def train(model: nn.Module, use_reentrant: bool) -> dict[str, Tensor]:
    """Every gradient, and every buffer, which the second computation moves once more."""
    x = torch.randn(3, 6, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    found = {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return {name: t for name, t in found.items() if t is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_and_statistics_are_eagers(name: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    eager = BLOCKS[name]().double()
    fused = fuse(copy.deepcopy(eager))
    got, expected = train(fused, use_reentrant), train(eager, use_reentrant)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
