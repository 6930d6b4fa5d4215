"""Whether every phase that reads what another wrote stands behind a barrier, read off the planned launches.

The interpreter runs one worker after another, so a missing barrier would never show there. What a phase reads and
writes is known without running it: from the fields of its arguments. Nothing is computed here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.blocks import Case, block
from support.matrix import family
from support.operator_arguments import every_gradient
from support.random_blocks import EVERY, cases
from torch import Tensor

from resnet_fused.backends import folding
from resnet_fused.ops import autograd
from resnet_fused.spec.facts import facts

pytest.importorskip("triton")
from resnet_fused.triton_kernels.device.epilogue import Epilogue
from resnet_fused.triton_kernels.device.reductions import Reduction, Tables, VectorGradients
from resnet_fused.triton_kernels.device.weight_gradient import WeightGradient
from resnet_fused.triton_kernels.host.backward import backward
from resnet_fused.triton_kernels.host.chips import CHIPS, INTERPRETER
from resnet_fused.triton_kernels.host.forward import forward
from resnet_fused.triton_kernels.host.infer import infer
from resnet_fused.triton_kernels.host.launch import Launch
from resnet_fused.triton_kernels.host.plan import Plan
from resnet_fused.triton_kernels.host.policies import Policy

# Fields that a phase writes; it reads every other tensor that it is given.
WRITTEN = {
    Epilogue: {"out"},
    Reduction: {"partials", "tickets", "stats", "table"},
    VectorGradients: {"table", "dgamma", "dbeta", "dfactor", "dbias"},
    WeightGradient: {"dweight", "partials", "tickets"},
    Tables: {"tables"},
}

Span = tuple[int, int, str]  # first byte, byte after the last, name of the field


def accesses(value: Any, name: str = "", written: bool = False) -> tuple[list[Span], list[Span]]:
    """(reads, writes) of a phase's arguments."""
    reads: list[Span] = []
    writes: list[Span] = []
    if isinstance(value, Tensor):
        last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        start, end = value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
        (writes if written else reads).append((start, end, name))
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for field, part in zip(fields, value, strict=True):
            inner = accesses(part, f"{name}.{field}", written or field in WRITTEN.get(type(value), ()))
            reads += inner[0]
            writes += inner[1]
    return reads, writes


def clash(one: list[Span], other: list[Span]) -> str | None:
    for a, b, name in one:
        for c, d, second in other:
            if a < d and c < b:
                return f"{name} and {second}"
    return None


def races(launch: Launch) -> list[str]:
    """Pairs of phases without a barrier between them, of which one writes what the other reads or writes."""
    arguments, _, _, _, barriers = launch.arguments
    found: list[str] = []
    level: list[tuple[str, list[Span], list[Span]]] = []
    for name, argument, barrier in zip(launch.names, arguments, barriers, strict=True):
        if barrier:
            level = []
        reads, writes = accesses(argument)
        for before, earlier_reads, earlier_writes in level:
            shared = clash(earlier_writes, reads + writes) or clash(earlier_reads, writes)
            if shared is not None:
                found.append(f"{before} | {name}: {shared}")
        level.append((name, reads, writes))
    return found


def planned(case: Case, library: frozenset[int] = frozenset()) -> list[Launch]:
    """The launches of the block's forward, backward and evaluation in single mode."""
    launches: list[Launch] = []
    policy = Policy(INTERPRETER, "single", library, launches.append)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    tensors = autograd.tensors_of(params, x)
    needs = every_gradient(tensors)
    known = facts(spec, needs)
    out, outputs, statistics = forward(spec, known, tensors, policy)
    backward(spec, known, torch.empty_like(out), out, outputs, statistics, tensors, needs, policy)
    if not spec.batch_stats:
        folded = folding.folded(params, x, spec, pack=False)
        pre = None if folded.pre is None else torch.stack([*folded.pre, *folded.pre])
        infer(
            spec, facts(spec), x, pre, folded.weights, folded.biases, folded.branch_scale, folded.skip_scale,
            tensors.slopes, policy,
        )  # fmt: skip
    return launches


@family
@example(case=block(2, "projection", memory="low", stride=2, strides_at=1), library=frozenset())
@given(case=cases(**EVERY), library=st.frozensets(st.integers(0, 3), max_size=2))
def test_any_block_waits_where_it_must(case: Case, library: frozenset[int]) -> None:
    launches = planned(case, frozenset(i for i in library if i < len(case.spec.convs)))
    assert [race for launch in launches for race in races(launch)] == []


@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_a_block_in_evaluation_waits_where_it_must(skip: str) -> None:
    launches = planned(block(3, skip, kernel=1, channels=8, batch_stats=False))  # type: ignore[arg-type]
    assert len(launches) == 3
    assert [race for launch in launches for race in races(launch)] == []


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_barrier_is_found(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: each barrier of a forward and a backward pass, left out in turn."""
    count = -1
    original = Plan.barrier

    def skipping(self: Plan) -> None:
        nonlocal count
        count += 1
        if count != missing:
            original(self)

    monkeypatch.setattr(Plan, "barrier", skipping)
    forward = planned(block(3, "identity", channels=8))[0]
    assert races(forward), f"barrier {missing} of {forward.names} is not missed"


def test_the_largest_blocks_wait_too() -> None:
    """Blocks as wide as ResNet-50's, planned for a real chip: other tiles, other partials."""
    case = block(3, "projection", channels=64, out_channels=256, width=64, stride=2, size=(9, 9))
    x, params, spec = case.build(torch.bfloat16, torch.channels_last)
    launches: list[Launch] = []
    tensors = autograd.tensors_of(params, x)
    policy = Policy(CHIPS["h100"], "single", submit=launches.append)
    needs = every_gradient(tensors)
    known = facts(spec, needs)
    out, outputs, statistics = forward(spec, known, tensors, policy)
    backward(spec, known, out, out, outputs, statistics, tensors, needs, policy)
    assert len(launches) == 2 and not any(races(launch) for launch in launches)
