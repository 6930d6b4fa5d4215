"""The phases of one block in order, and when they are launched: all in one cooperative launch, or each as it comes.

A `Plan` is filled by forward.py, backward.py and infer.py. In phased mode each phase is launched as soon as it is
planned: the GPU works while Python plans on, and a tensor that nobody else holds is free for what follows on the
stream. A single launch waits for all phases. Library convolutions between them end one launch and begin the next, so
"single" then means one launch between two library convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends.how import Mode

from ..device.reductions import Tables
from .chips import Chip
from .launch import Config, Launch, Phase, Submit, launch_of
from .tuning import Tile

TICKETS = 1 << 16  # int32 counters of a workspace; the first is the grid barrier's


class Plan:
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


def table_phase(tables: Tables) -> tuple[Config, tuple[Any, ...], Tile, int]:
    blocks = sum(-(-width // 256) for width in tables.channels)
    return None, tables, Tile(1, 256), blocks


def _workspace(device: torch.device) -> Tensor:
    """Zeroed counters, shared by the launches of one stream, because these do not overlap.

    A graph under capture gets its own, cleared in the graph: it may be replayed on any stream.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(TICKETS, dtype=torch.int32, device=device)
        return _stream_workspace(device, torch.cuda.current_stream(device).cuda_stream)
    return _stream_workspace(device, 0)


@lru_cache(maxsize=64)  # one that falls out: its memory is reused after the launches of its stream
def _stream_workspace(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)
