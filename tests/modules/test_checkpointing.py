"""Activation checkpointing around fused blocks: eager's gradients, statistics and random numbers, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.shared_blocks import SeveralCalls
from support.small_net import picture, small_net
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from resnet_fused import functional, fuse, unfuse
from resnet_fused.models.resnet import PreBasicBlock
from resnet_fused.tools.saved_bytes import saved_bytes

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64
KEPT = [torch.ops.resnet_fused.residual_block_forward.default]


def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "selective": selective,
}


def step(model: nn.Module, x: Tensor, way: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Any]:
    """A training step's results; the model's state among them."""
    torch.manual_seed(2)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = way(model, x)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": out.detach(), "gradient": x.grad, "gradients": gradients, "state": dict(model.state_dict())}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", WAYS)
def test_gradients_and_statistics_are_eagers(name: str, backend: str) -> None:
    """PyTorch's norms blend a batch into their statistics each time it is computed: twice, where it is checkpointed."""
    eager = small_net().double()
    eager[1].bn1.momentum = None  # type: ignore[union-attr]
    fused = fuse(copy.deepcopy(eager), backend=backend)
    for _ in range(2):
        expected, got = (step(model, picture().double(), WAYS[name]) for model in (eager, fused))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert int(fused[0].bn1.num_batches_tracked) == 4  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("name", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("make", [lambda: PreBasicBlock(6, 6), SeveralCalls], ids=["pre-activation", "several calls"])
def test_other_blocks(make: Callable[[], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    eager = make().double()
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(3, 6, 6, 4, dtype=torch.float64)
    expected, got = (step(model, x, WAYS[name]) for model in (eager, fused))
    torch.testing.assert_close(got, expected, **CLOSE)


class Gated(nn.Module):
    """A block whose gate drops pictures, and is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.squeeze = small_net()[1], nn.Linear(8, 8)

    def gate(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.squeeze(pooled)) * torch.empty_like(pooled[:, :1]).bernoulli_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        params, spec, _ = self.block.fused_describe()  # type: ignore[operator, union-attr]
        return functional.residual_block(x, params, spec, gate=self.gate)


@pytest.mark.parametrize("name", ["reentrant", "not reentrant"])
def test_a_gate_draws_the_same_numbers_again(name: str) -> None:
    model = fuse(Gated()).double()
    twin, x = copy.deepcopy(model), torch.randn(6, 8, 5, 4, dtype=torch.float64)
    expected, got = step(twin, x, lambda m, x: m(x)), step(model, x, WAYS[name])
    state = got.pop("state")
    del expected["state"]
    torch.testing.assert_close(got, expected, **CLOSE)
    counters = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert all(int(counter) == 2 for counter in counters) and len(counters) == 2


class Normed(nn.Module):
    def __init__(self, act: str, fused: bool) -> None:
        super().__init__()
        self.bn, self.act, self.fused = nn.BatchNorm2d(8).double(), act, fused

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm_act(x, self.bn, act=self.act, backend="native" if self.fused else "eager")


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_norm_on_its_own(act: str) -> None:
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64)
    expected, got = (step(Normed(act, fused), x, WAYS["not reentrant"]) for fused in (False, True))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert int(got["state"]["bn.num_batches_tracked"]) == 2


@pytest.mark.parametrize("memory", ["default", "low"])
def test_under_autocast(memory: str) -> None:
    """Backward computes under the autocast of forward, whose bits come out again."""
    model = fuse(small_net(), memory=memory)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)

    def within(way: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return way(model, x).float()

    got = step(model, picture(), partial(within, WAYS["not reentrant"]))
    expected = step(twin, picture(), partial(within, lambda m, x: m(x)))
    for part in ("output", "gradient", "gradients"):
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)


def test_keeps_less() -> None:
    model = fuse(small_net())
    kept = {
        name: saved_bytes(lambda way=way: way(model, picture().requires_grad_()), model.buffers())  # type: ignore[misc]
        for name, way in {**WAYS, "plain": lambda m, x: m(x)}.items()
    }
    assert kept["reentrant"] == kept["not reentrant"] == 0
    assert 0 < kept["sequential"] < kept["plain"]


def test_timms_own_checkpointing() -> None:
    resnet = pytest.importorskip("timm.models.resnet")
    torch.manual_seed(0)
    eager = resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 8, 8), stem_width=8, zero_init_last=False
    ).double()
    eager.set_grad_checkpointing()
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, got = (step(model, x, lambda m, x: m(x)) for model in (eager, fused))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert int(unfuse(fused).layer4[0].bn1.num_batches_tracked) == 2
