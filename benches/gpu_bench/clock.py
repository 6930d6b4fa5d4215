"""One timing: the device's work alone, and the call as its caller sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSHED = 256 << 20  # bytes: more than any L2
Step = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    device: float
    call: float


class Clock:
    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.scratch = torch.empty(FLUSHED if self.cuda else 1, dtype=torch.int8, device=device)
        if self.cuda:
            waits = [self._between(lambda: torch.cuda._sleep(10_000_000)) for _ in range(10)]
            self.cycles_per_second = 1e7 / min(waits)  # the first ones wait for the clock to rise from idle

    def sample(self, step: Step) -> Sample:
        self.scratch.zero_()
        self.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        self.synchronize()
        call = time.perf_counter() - start
        if not self.cuda:
            return Sample(call, call)
        self.scratch.zero_()
        torch.cuda._sleep(int(2 * min(host, 0.1) * self.cycles_per_second))  # the GPU waits until everything is queued
        return Sample(self._between(step), call)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _between(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
