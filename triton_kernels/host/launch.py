"""A launch: phases that run as one kernel, alone or with grid barriers between them, and on how many workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..device import program
from ..device.chained import ChainedConfig
from ..device.convolution import ConvolutionConfig
from ..device.pointwise import PointwiseConfig
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


@dataclass(frozen=True)
class Phase:
    """name: for people. items: how many workers it could keep busy. barrier: reads what an earlier phase wrote."""

    name: str
    config: Config
    arguments: tuple[Any, ...]
    tile: Tile
    items: int
    barrier: bool


@dataclass(frozen=True)
class Launch:
    """One launch of `program.run_phases`. workers: all that can be busy; a cooperative launch takes as many as fit."""

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

    The compiled kernel itself is asked, with the arguments of the launch: for other alignments of pointers and sizes
    Triton compiles the same phases again, and such kernels differ in registers and shared memory.
    """
    kernel = program.run_phases.warmup(*launch.arguments, grid=(1,), **launch.options)
    kernel._init_handles()  # loads a new kernel, after which its registers are known
    chip = chips.of_device(torch.cuda.current_device())
    fit = occupancy.workers(chip, kernel.n_regs, launch.warps, kernel.metadata.shared)
    return chip.sms * max(fit, 1)
