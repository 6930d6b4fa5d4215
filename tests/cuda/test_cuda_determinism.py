"""The same bits in whatever order the threads run."""

from __future__ import annotations

import pytest
from emulator.emulated import EmulatedBackend, Emulator
from support.emulated_runs import RUNS
from support.same_bits import assert_same_bits


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", RUNS)
def test_same_bits_in_any_order_of_threads(name: str, emulator: Emulator, backend: EmulatedBackend) -> None:
    first, *others = (RUNS[name].results(emulator, backend, seed) for seed in range(8))
    for other in others:
        assert_same_bits(other, first)
