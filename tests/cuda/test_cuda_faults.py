"""Tests of the tests: a planted fault and a missing barrier show."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.emulated import EmulatedBackend, Emulator
from emulator.faults import FAULTS
from support.blocks import block, bottleneck, frozen
from support.emulated_runs import RUNS, Run
from support.equivalence import Results
from support.launch_lines import phases


def test_runs_meet_what_they_are_for(emulator: Emulator, backend: EmulatedBackend) -> None:
    expected = {
        "training": ["3 cooperative: ", "data gradient of 64 rows, 4 buffers"],
        "evaluation": ["2: chain with projection"],
        "splits": ["5 cooperative: ", ", 2 splits"],
        "large tiles": ["of 128 rows"],
        "odd channels": ["2 cooperative: "],
        "reductions": ["6 cooperative: pass | pass"],
        "computed again": ["table | convolution of 64 rows, 4 buffers | convolution"],
        "phases": ["2: convolution of 64 rows"],
    }
    for name, texts in expected.items():
        RUNS[name].results(emulator, backend, 0)
        launched = "\n".join(emulator.launched())
        assert all(text in launched for text in texts), (name, launched)


def differs(got: Results, expected: Results) -> bool:
    return any(value is not None and not torch.equal(got[name], value) for name, value in expected.items())  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned")  # else what is read too early may be what an earlier call has left there
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_shows(
    name: str, launcher_of: Callable[[str], Path], emulator: Emulator, backend: EmulatedBackend
) -> None:
    """In one order of the threads at least, as other bits than the honest kernels', NaN, or an error."""
    chosen, orders = RUNS[FAULTS[name].block], FAULTS[name].orders
    honest = chosen.results(emulator, backend, 0)
    broken = Emulator(launcher_of(name))
    broken.install()
    shown = 0
    for seed in range(orders):
        try:
            got = chosen.results(broken, backend, seed)
        except RuntimeError:
            shown += 1
        else:
            shown += differs(got, honest)
    print(f"shown in {shown} of {orders} orders")
    assert shown == 0 if name == "none" else shown > 0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["identity", "projection", "chain of 2", "evaluation"])
def test_each_barrier_of_the_plan_is_needed(name: str, emulator: Emulator, backend: EmulatedBackend) -> None:
    """Left out, it shows: so no other is missing where this block's phases wait for each other."""
    shape: Any = {"channels": 72, "width": 8, "size": (9, 9)}  # work for all workers, little of it in a phase
    chosen = {
        "identity": Run(bottleneck("identity", "pre", bias=True, **shape), (64, 3)),
        "projection": Run(bottleneck("projection", memory="low", stride=1, **shape), (64, 3)),
        "chain of 2": Run(
            block(2, "none", order="pre", memory="low", stride=2, strides_at=1, branch_scale="[C]", **shape), (64, 3)
        ),
        "evaluation": Run(frozen(bottleneck("projection", "pre", stride=1, **shape)), (64, 3), False),
    }[name]
    honest = chosen.results(emulator, backend, 0)
    launched = emulator.launched()
    barriers = [
        (launch, phase)
        for launch, line in enumerate(launched)
        for phase, before in enumerate(re.findall(r"(: |; | \| )", line))
        if before == " | "
    ]
    assert len(barriers) > 2

    def shows(launch: int, phase: int) -> bool:
        runs = (
            chosen.results(emulator, backend, seed, partial(emulator.leave_out_barrier, launch, phase))
            for seed in range(16)
        )
        return any(differs(got, honest) for got in runs)

    silent = [phases(launched[launch])[phase] for launch, phase in barriers if not shows(launch, phase)]
    # the last convolution's gradients wait for the projection's, which nothing but dx reads
    allowed = ["weight gradient"] if chosen.training and chosen.case.spec.projection else []
    assert silent in ([], allowed)
