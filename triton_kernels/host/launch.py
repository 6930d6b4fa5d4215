"""Runs a list of phases: in one cooperative launch, or phase by phase.

A `Program` is filled by residual_block.py. In phased mode each phase is launched as soon as it is planned: the GPU
works while Python plans on, and a tensor that nobody else holds is free for what follows on the stream. A single launch
waits for all phases. Library convolutions may stand between them: they end one launch and begin the next, so "single"
then means one launch between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from resnet_fused.backends.how import Mode

from ..device import program
from ..device.chained import ChainedConfig
from ..device.convolution import ConvolutionConfig
from ..device.pointwise import PointwiseConfig
from ..device.reductions import Tables
from ..device.weight_gradient import WeightGradientConfig
from . import chips, occupancy
from .chips import Chip
from .tuning import Tile

Config = ConvolutionConfig | PointwiseConfig | WeightGradientConfig | ChainedConfig | None
KINDS = {
    ConvolutionConfig: program.CONVOLUTION,
    PointwiseConfig: program.POINTWISE,
    WeightGradientConfig: program.WEIGHT_GRADIENT,
    ChainedConfig: program.CHAINED,
    type(None): program.TABLES,
}
INTERPRETED = triton.knobs.runtime.interpret
TICKETS = 1 << 16  # int32 counters of a workspace; the first is the grid barrier's


@dataclass(frozen=True)
class Phase:
    """name: for people. items: how many workers it could keep busy. barrier: reads what an earlier phase wrote."""

    name: str
    config: Config
    arguments: tuple[Any, ...]
    tile: Tile
    items: int
    barrier: bool


class Program:
    """The phases of one block, in order; launched one by one, or when a library call needs results and at the end.

    `tickets` hands out the counters of the workspace.
    """

    def __init__(self, device: torch.device, mode: Mode, chip: Chip, submit: Submit | None = None) -> None:
        """submit: what to do with a launch, other than to run it."""
        self.device, self.mode, self.chip = device, mode, chip
        self._submit = submit or Launch.run
        self._workspace = _workspace(device)
        self._phases: list[Phase] = []
        self._barrier = False
        self._used = 32

    def barrier(self) -> None:
        """The next phase reads what the phases before it wrote."""
        self._barrier = True

    def phase(self, name: str, config: Config, arguments: tuple[Any, ...], tile: Tile, items: int) -> None:
        """items: how many workers the phase could keep busy."""
        self._phases.append(Phase(name, config, arguments, tile, items, self._barrier))
        self._barrier = False
        if self.mode == "phased":
            self.run()

    def call(self, library: Callable[[], Tensor]) -> Tensor:
        """A library convolution, after everything before it."""
        self.run()
        return library()

    def tickets(self, count: int) -> Tensor:
        """int32 [>= count], zero, and zero again after the launch; aligned to 128 bytes."""
        start = self._used
        self._used += -(-count // 32) * 32
        if self._used > TICKETS:
            return torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._workspace[start : start + count]

    def workers(self, tile: Tile) -> int:
        """The most workers that a launch may have: for the sizes of partials."""
        return self.chip.sms * tile.workers

    def run(self) -> None:
        """Launches the phases that have not run yet."""
        phases, self._phases, self._barrier = self._phases, [], False
        if phases:
            self._submit(launch_of(phases, self.chip, self._workspace))


@dataclass(frozen=True)
class Launch:
    """One launch of `program.run_phases`. workers: as many as can be busy; a cooperative launch takes what fits."""

    names: tuple[str, ...]
    arguments: tuple[Any, ...]
    warps: int
    workers: int
    cooperative: bool

    def run(self) -> None:
        grid = self.workers
        if self.cooperative and not INTERPRETED:
            grid = min(grid, resident_workers(self))
        program.run_phases[(grid,)](*self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "launch_cooperative_grid": self.cooperative}


Submit = Callable[[Launch], None]


def launch_of(phases: list[Phase], chip: Chip, workspace: Tensor) -> Launch:
    """One launch of these phases."""
    barriers = tuple(phase.barrier and i > 0 for i, phase in enumerate(phases))
    arguments = (
        tuple(phase.arguments for phase in phases),
        workspace,
        tuple(KINDS[type(phase.config)] for phase in phases),
        tuple(phase.config for phase in phases),
        barriers,
    )
    workers = min(chip.sms * min(phase.tile.workers for phase in phases), max(phase.items for phase in phases))
    if chip.arch == 0 and any(barriers):
        workers = 1  # the interpreter runs workers one after another: none may wait for another
    names = tuple(phase.name for phase in phases)
    return Launch(names, arguments, max(phase.tile.warps for phase in phases), workers, any(barriers))


def resident_workers(launch: Launch) -> int:
    """How many workers of this launch the current device holds at once; they all wait for each other.

    Asked of the compiled kernel itself, by the arguments it will be launched with: Triton compiles the same phases once
    more for other alignments of pointers and sizes, and such kernels differ in registers and shared memory.
    """
    kernel = program.run_phases.warmup(*launch.arguments, grid=(1,), **launch.options)
    kernel._init_handles()  # loads it, if it is new, which tells its registers
    chip = chips.of_device(torch.cuda.current_device())
    fit = occupancy.workers(chip, kernel.n_regs, launch.warps, kernel.metadata.shared)
    return chip.sms * max(fit, 1)


def table_phase(tables: Tables) -> tuple[Config, tuple[Any, ...], Tile, int]:
    blocks = sum(-(-width // 256) for width in tables.channels)
    return None, tables, Tile(1, 256), blocks


def _workspace(device: torch.device) -> Tensor:
    """Zeroed counters; those of one stream, because launches of one stream do not overlap.

    A graph under capture gets its own, cleared in the graph: it may be replayed on any stream.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(TICKETS, dtype=torch.int32, device=device)
        return _stream_workspace(device, torch.cuda.current_stream(device).cuda_stream)
    return _stream_workspace(device, 0)


@lru_cache(maxsize=64)  # what falls out was allocated on its stream, so it is reused after the launches there
def _stream_workspace(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)
