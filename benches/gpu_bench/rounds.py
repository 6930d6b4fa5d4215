"""Contestants in turns, round by round, and what becomes of one that fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from gpu_bench.budget import Budget
from gpu_bench.clock import Sample
from gpu_bench.contestants import BENCHMARKED, PEER
from gpu_bench.desk import Desk
from gpu_bench.error_text import error_text
from gpu_bench.remote import Remote
from gpu_bench.setting import NETWORK, Key, Setting


@dataclass
class Figures:
    """Of one contestant; what was not found out is None."""

    samples: list[Sample] = field(default_factory=list)
    peak_bytes: int | None = None
    kernels: int | None = None
    own_launches: int | None = None


@dataclass
class Bench:
    setting: Setting
    budget: Budget
    seconds: float  # of timing for one group, after warm-up
    local: Desk
    remote: Remote
    groups: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def desk(self, contestant: str) -> Desk | Remote:
        return self.remote if contestant == BENCHMARKED else self.local

    def run(self, key: Key, direction: str, contestants: Sequence[str], tier: str) -> None:
        """One group: these contestants in turns with eager."""
        title = f"{key[0]}, batch {key[1]}, {direction}"
        kind = (tier, key[0] == NETWORK, key[0] in self.setting.passes())
        if not self.budget.affords(kind):
            self.dropped.append(f"{title}: {', '.join(contestants)}")
            return
        print(f"{title}: {', '.join(contestants)} ({self.budget.left:.0f} s left)", flush=True)
        with self.budget.spend(kind):
            figures = self._interleaved(key, direction, (PEER, *contestants), title)
        for desk in (self.local, self.remote):
            self._guarded(f"{title}, cleaning up", desk, "finish")
        entry = {name: asdict(f) for name, f in figures.items() if f.samples}
        self.groups.append({"block": key[0], "batch": key[1], "direction": direction, "contestants": entry})

    def _interleaved(self, key: Key, direction: str, contestants: Sequence[str], title: str) -> dict[str, Figures]:
        figures: dict[str, Figures] = {}
        for name in contestants:
            desk, what = self.desk(name), f"{title}, {name}"
            if self._guarded(what, desk, "open", key, name, direction) and self._guarded(what, desk, "warm", name):
                figures[name] = Figures()
                if key[0] == NETWORK and (peak := self._guarded(what, desk, "peak", name)):
                    figures[name].peak_bytes = peak[0]
                if key[1] == self.setting.main_batch and (seen := self._guarded(what, desk, "launches", name)):
                    figures[name].kernels, figures[name].own_launches = seen[0]
        names, rounds, turn, start = list(figures), 1, 0, time.monotonic()
        while turn < rounds and names:
            first = turn % len(names)
            taken = {
                name: self._guarded(f"{title}, {name}", self.desk(name), "sample", name)
                for name in names[first:] + names[:first]
            }
            if not all(taken.values()):  # the round counts for nobody
                names = [name for name in names if taken[name]]
                continue
            for name in names:
                figures[name].samples += taken[name] or ()
            turn += 1
            if turn == 1 and not self.setting.dry:
                rounds = min(max(ceil(self.seconds / (time.monotonic() - start)), 5), 25)
        return {name: figures[name] for name in names}

    def _guarded(self, what: str, desk: Desk | Remote, *request: Any) -> tuple[Any] | None:
        """(what the desk answered,), or None after noting the error."""
        try:
            return (desk(*request),)
        except Exception as error:
            self.errors.append(f"{what}: {error_text(error)}")
            print(f"FAILED {self.errors[-1]}", file=sys.stderr, flush=True)
            return None
