"""One contender with all it needs, in this process or in a worker's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fused.tools.bench.contenders import CONTENDERS, Contender
from resnet_fused.tools.bench.reference import Errors, Reference
from resnet_fused.tools.bench.task import Task

TURN = 0.1  # seconds: a faster contender runs several times per turn, the first time untimed


class Desk:
    """A contender, made ready for a task.

    alone: whether this process holds no other contender, so that its peak memory is this one's.
    """

    def __init__(
        self, contender: Contender, model: nn.Module, x: Tensor, labels: Tensor, task: Task, alone: bool = False
    ) -> None:
        self.task, self.alone = task, alone
        _give_back()
        self.before = _resident("VmRSS")
        self.prepared = contender.prepare(model, x, labels, task)
        self.calls = 1

    def errors(self, reference: Reference | str) -> Errors:
        """Of one step, against a reference or the file of one."""
        if isinstance(reference, str):
            reference = torch.load(reference, weights_only=False)
        assert isinstance(reference, Reference)
        return reference.errors(self.prepared)

    def warm(self) -> None:
        """Decides how many steps a turn has; peak memory counts from here."""
        self._seconds(1)
        self.calls = max(1, round(TURN / self._seconds(1)))
        _give_back()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def turn(self) -> float:
        """Seconds of a step, on average over the turn."""
        if self.calls > 1:
            self._seconds(1)
        return self._seconds(self.calls) / self.calls

    def saved(self) -> int | None:
        """Bytes that autograd saves for backward."""
        return self.prepared.saved() if self.prepared.saved else None

    def peak(self) -> int | None:
        """Bytes since `warm`: on a GPU allocated, else this process's resident size above what it was before the model
        was prepared. None where other contenders share the process."""
        if not self.alone:
            return None
        if torch.device(self.task.device).type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = _resident("VmHWM")
        return None if peak is None or self.before is None else max(peak - self.before, 0)

    def pinned(self) -> str:
        """The cores of this process's threads, each kind once, as in "0,1 | 0"."""
        masks = set()
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                masks.add(tuple(sorted(os.sched_getaffinity(int(thread.name)))))
        return " | ".join(",".join(map(str, mask)) for mask in sorted(masks, key=lambda m: (-len(m), m)))

    def _seconds(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.prepared.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def open_desk(name: str, task: Task) -> Desk:
    """In a worker: builds the task's model and the contender of that name."""
    torch.set_num_threads(task.threads)
    (contender,) = (c for c in CONTENDERS if c.name == name)
    return Desk(contender, *task.build(), task, alone=True)


def _give_back() -> None:
    """Freed memory that the allocator keeps would hide what is allocated next."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int | None:
    """Bytes, of this process's status file; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None
