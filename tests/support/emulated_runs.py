"""Blocks that between them meet every kind of phase, to be run on the emulator in many orders of its threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from emulator.emulated import EmulatedBackend, Emulator
from support.blocks import Case, bottleneck, frozen
from support.emulated_blocks import block
from support.equivalence import Results
from support.runs import run


@dataclass(frozen=True)
class Run:
    """A block, what is done with it, and where."""

    case: Case
    device: tuple[int, int]
    training: bool = True
    mode: str = "single"
    library: str = "none"

    def results(
        self, emulator: Emulator, backend: EmulatedBackend, seed: int, before: Callable[[], None] = lambda: None
    ) -> Results:
        """In bfloat16, the threads in the order of `seed`."""
        backend.set_how(self.mode, self.library)  # type: ignore[arg-type]
        emulator.configure(*self.device, seed=1000 * seed)
        before()
        dout = self.case.upstream(torch.bfloat16) if self.training else None
        return run(*self.case.build(torch.bfloat16, torch.channels_last), "emulated", dout)


RUNS = {
    "training": Run(bottleneck("projection", channels=24, width=16, size=(15, 13)), (64, 3)),
    "evaluation": Run(frozen(bottleneck("projection", channels=24, width=16, size=(17, 15), bias=True)), (1, 2), False),
    "splits": Run(block(2, "none", channels=24, width=72, kernel=1, size=(23, 23)), (64, 5)),
    "large tiles": Run(bottleneck("identity", "pre", channels=72, width=8, size=(17, 19)), (2, 4)),
    "odd channels": Run(
        bottleneck("identity", channels=13, width=5, memory="low", branch_scale="[C]", size=(17, 19)), (64, 2)
    ),
    "reductions": Run(
        block(1, "none", order="pre", kernel=1, channels=256, out_channels=8, size=(13, 11)), (64, 6), library="all"
    ),
    "computed again": Run(block(2, "none", memory="low", stride=2, strides_at=1, channels=72, size=(9, 9)), (64, 3)),
    "phases": Run(bottleneck("projection", "pre"), (64, 3), mode="phased"),
}
