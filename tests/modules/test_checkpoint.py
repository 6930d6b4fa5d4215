"""Activation checkpointing: blocks that are computed again, as far as autograd needs it, give what eager's give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.shared_blocks import Gated, SeveralCalls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused import functional, fuse
from resnet_fused.models.resnet import BasicBlock, PreBasicBlock


class NormAct(nn.Module):
    """On its own; `fused` says which."""

    fused = False

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm_act(x, self.bn) if self.fused else self.bn(x).relu()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "two blocks": lambda: nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 6)),
    "pre-activation": lambda: PreBasicBlock(6, 6),
    "gated": Gated,
    "several calls": SeveralCalls,
    "batch norm": NormAct,
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
    fused = copy.deepcopy(eager)
    if isinstance(fused, NormAct):
        fused.fused = True
    else:
        fuse(fused)
    got, expected = train(fused, use_reentrant), train(eager, use_reentrant)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
