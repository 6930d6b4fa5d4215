"""How Triton's phases are launched: when, what is let go between launches, and on how many workers.

Planned for a real chip and handed to the test instead of the chip: nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.blocks import Case, block
from support.live_memory import live_memory
from support.operator_arguments import every_gradient

from resnet_fused.backends.how import Mode
from resnet_fused.ops import autograd
from resnet_fused.spec.facts import facts

pytest.importorskip("triton")
from resnet_fused.triton_kernels.host import chips, launch, occupancy
from resnet_fused.triton_kernels.host.backward import backward
from resnet_fused.triton_kernels.host.chips import CHIPS
from resnet_fused.triton_kernels.host.forward import forward
from resnet_fused.triton_kernels.host.launch import Launch
from resnet_fused.triton_kernels.host.plan import Plan
from resnet_fused.triton_kernels.host.policies import Policy

MODES: tuple[Mode, ...] = ("phased", "single")
IDENTITY = block(3, "identity", channels=256, width=64, kernel=1, size=(14, 14), batch=8)
PROJECTION = block(3, "projection", channels=64, width=64, out_channels=256, kernel=1, size=(14, 14), batch=8)


def backward_of(case: Case, mode: Mode, library: frozenset[int], submit: Callable[[Launch], None]) -> Callable[[], Any]:
    x, params, spec = case.build(torch.bfloat16, torch.channels_last)
    tensors = autograd.tensors_of(params, x)
    policy = Policy(CHIPS["h100"], mode, library, submit)
    needs = every_gradient(tensors)
    known = facts(spec, needs)
    out, outputs, statistics = forward(spec, known, tensors, policy)
    dout = torch.empty_like(out)
    return lambda: backward(spec, known, dout, out, outputs, statistics, tensors, needs, policy)


@pytest.mark.parametrize("mode", MODES)
def test_when_phases_are_launched(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    original = Plan.phase

    def phase(self: Plan, name: str, *rest: Any) -> None:
        events.append(f"plan {name}")
        original(self, name, *rest)

    def submit(launched: Launch) -> None:
        events.append(f"launch {', '.join(launched.names)}")

    run = backward_of(IDENTITY, mode, frozenset(), submit)
    events.clear()
    monkeypatch.setattr(Plan, "phase", phase)
    run()
    planned = [event.removeprefix("plan ") for event in events if event.startswith("plan")]
    assert len(planned) > 5
    if mode == "phased":
        assert events == [f"{what} {name}" for name in planned for what in ("plan", "launch")]
    else:
        assert events[-1] == f"launch {', '.join(planned)}" and len(events) == len(planned) + 1


@pytest.mark.parametrize("library", [frozenset(), frozenset(range(4))], ids=["none", "all"])
@pytest.mark.parametrize("case", [IDENTITY, PROJECTION], ids=["identity", "projection"])
def test_what_nothing_will_read_is_let_go(case: Case, library: frozenset[int]) -> None:
    phased, single = (live_memory(backward_of(case, mode, library, lambda launched: None)) for mode in MODES)
    assert phased.allocated == single.allocated
    assert phased.peak < 0.6 * phased.allocated
    assert phased.peak < single.peak
    if not library:
        assert single.peak == single.allocated, "one launch needs all at once"


# --- workers of a cooperative launch ---------------------------------------------------------------------------------


def test_workers_are_those_of_the_kernel_that_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same phases are another kernel for other alignments, which here has three times the registers."""
    grids: list[int] = []

    class Kernels:
        """As Triton's, which compiles a kernel for each specialisation of its arguments."""

        def warmup(self, phases: tuple[Any, ...], *_: Any, grid: tuple[int], **options: Any) -> SimpleNamespace:
            registers = 64 if phases[0][0].data_ptr() % 16 == 0 and phases[0][1] % 16 == 0 else 192
            metadata = SimpleNamespace(shared=1024)
            return SimpleNamespace(n_regs=registers, metadata=metadata, _init_handles=lambda: None)

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **options: grids.append(*grid)

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch.program, "run_phases", Kernels())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(chips, "of_device", lambda index: CHIPS["h100"])
    memory = torch.zeros(64)
    for pointer, size in ((memory, 32), (memory, 33), (memory[1:], 32), (memory, 64)):
        Launch(("a phase",), (((pointer, size),), memory, ("pointwise",), (None,), (True,)), 4, 10**6, True).run()
    few, many = (132 * occupancy.workers(CHIPS["h100"], registers, 4, 1024) for registers in (192, 64))
    assert few < many and grids == [many, few, few, many]
