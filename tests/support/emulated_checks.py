"""Blocks on the emulated device, held against the reference: on which devices, in which launch modes, how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.emulated import EmulatedBackend, Emulator
from support.block_equivalence import assert_equivalent
from support.blocks import Case, frozen
from support.equivalence import assert_as_accurate, pooled
from support.runs import run, run_exact

# The device that planning sees and how many of its workers run. A small one takes large tiles and, in evaluation, a
# chain; a large one small tiles, the phases, and weight gradients in splits.
SMALL, LARGE = (1, 2), (64, 5)
devices = pytest.mark.parametrize("device", [SMALL, LARGE], ids=["small", "large"])
MODES = ("single", "phased")
modes = pytest.mark.parametrize("mode", MODES)
SEEDS, FEW = range(4), range(2)  # pooled, so that one lucky eager rounding does not set the bar; few of many values


class Checks:
    """Blocks held against the reference on the emulated device."""

    def __init__(self, emulator: Emulator, backend: EmulatedBackend) -> None:
        self.emulator, self.backend = emulator, backend

    def set(
        self,
        mode: str = "single",
        library: str = "none",
        tf32: bool = False,
        device: tuple[int, int] = SMALL,
        shared_memory: int | None = None,
    ) -> None:
        """shared_memory: of a worker, in KiB."""
        self.backend.set_how(mode, library, tf32)  # type: ignore[arg-type]
        self.emulator.configure(*device)
        if shared_memory is not None:
            self.emulator.set_shared_memory(shared_memory << 10)

    def trains(
        self,
        case: Case,
        mode: str = "single",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        seeds: range = SEEDS,
        norm_dtype: torch.dtype | None = None,
        **how: Any,
    ) -> list[str]:
        """The output, every gradient and the running statistics; returns what was launched."""
        self.set(mode, **how)
        blocks = [case.build(dtype, memory_format, seed, norm_dtype) for seed in seeds]
        assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in seeds], "emulated")
        return self.emulator.launched()

    def evaluates(
        self, case: Case, mode: str = "single", dtype: torch.dtype = torch.float32, seeds: range = range(4), **how: Any
    ) -> str:
        """The output without autograd; returns what one call launched."""
        self.set(mode, **how)
        built = [frozen(case).build(dtype, torch.channels_last, seed) for seed in seeds]
        got = pooled([run(*each, "emulated") for each in built])["out"]
        eager = pooled([run(*each, "eager") for each in built])["out"]
        assert_as_accurate("out", got, eager, pooled([run_exact(*each) for each in built])["out"])
        launched = self.emulator.launched()
        once = launched[: len(launched) // len(seeds)]
        assert launched == once * len(seeds)
        return "\n".join(once)
