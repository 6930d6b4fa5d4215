"""One table: the contenders of a task, checked, then timed in turns."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_fused.tools.bench.contenders import OURS, Contender
from resnet_fused.tools.bench.desk import Desk
from resnet_fused.tools.bench.reference import Errors, Reference
from resnet_fused.tools.bench.rounds import Progress, Spread, interleaved, ratios
from resnet_fused.tools.bench.task import Task
from resnet_fused.tools.bench.worker import Worker
from resnet_fused.tools.tables import table

Method = Callable[..., Any]  # of a `Desk`: its name and arguments


@dataclass(frozen=True)
class Entry:
    """One contender that was timed.

    seconds: of a step, in each round. ratio: its seconds / ours in the same round, None for ours.
    errors:  relative, against eager float32. pinned: cores of its threads.
    saved:   bytes for backward. peak: bytes, see `Desk.peak`.
    """

    name: str
    about: str
    seconds: list[float]
    ratio: Spread | None
    errors: Errors
    saved: int | None
    peak: int | None
    pinned: str

    @property
    def median(self) -> float:
        return Spread.of(self.seconds).middle


@dataclass
class Run:
    """absent: contenders that were not timed, and why: not for this task, not installed, failed, or wrong."""

    task: Task
    entries: list[Entry] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    limits: Errors = field(default=Errors(0.0))

    def table(self) -> str:
        """One row per contender; absent contenders with the reason."""
        columns = {
            "": lambda e: e.name,
            "images/s": lambda e: f"{self.task.batch / e.median:.1f}",
            "ms": lambda e: f"{e.median * 1e3:.2f}",
            "time / ours": lambda e: "" if e.ratio is None else f"{e.ratio.middle:.2f}",
            "p20 to p80": lambda e: "" if e.ratio is None else str(e.ratio),
            "rel. error": lambda e: " / ".join(f"{error:.0e}" for error in e.errors if error is not None),
            "peak MiB": lambda e: _mebibytes(e.peak),
            "saved MiB": lambda e: _mebibytes(e.saved),
            "cores": lambda e: e.pinned,
        }
        if self.task.mode == "eval":
            del columns["saved MiB"]
        parts = []
        if self.entries:
            rows = [[str(cell(entry)) for cell in columns.values()] for entry in self.entries]
            parts.append(table(self.task.title, list(columns), rows))
        if self.absent:
            parts.append(table("Not timed", ("contender", "why"), list(map(list, self.absent.items()))))
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        entries = [
            {
                "name": entry.name,
                "about": entry.about,
                "images_per_second": self.task.batch / entry.median,
                "seconds": entry.seconds,
                "time_over_ours": None if entry.ratio is None else entry.ratio.to_dict(),
                "errors": entry.errors._asdict(),
                "saved_bytes": entry.saved,
                "peak_bytes": entry.peak,
                "cores_of_threads": entry.pinned,
            }
            for entry in self.entries
        ]
        return {
            "title": self.task.title,
            "mode": self.task.mode,
            "batch": self.task.batch,
            "dtype": self.task.dtype,
            "accepted_errors": self.limits._asdict(),
            "contenders": entries,
            "absent": self.absent,
        }


def measure(
    task: Task,
    contenders: Sequence[Contender],
    cores: Sequence[int],
    rounds: int,
    one_process: bool = False,
    pin: bool = True,
    progress: Progress = lambda _: None,
) -> Run:
    """Time the contenders, `OURS` among them, each in a process of its own unless `one_process`.

    cores: as many as threads; pin: each of PyTorch's threads to one of them, in processes of their own.

    Contenders that are absent, fail or compute something else are explained in the result; if ours does, nothing is
    timed. Raises BenchError if a contender's process fails while it is timed.
    """
    run = Run(task)
    for contender in contenders:
        if (reason := contender.absent(task)) is not None:
            run.absent[contender.name] = reason
    with contextlib.ExitStack() as stack:
        stack.enter_context(confined(cores))
        built = task.build()
        progress("reference")
        reference = Reference.of(*built, task)
        run.limits = reference.limits
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "reference.pt")
        torch.save(reference, file)
        ready: dict[str, tuple[Contender, Method, Errors]] = {}
        for contender in contenders:
            if contender.name in run.absent:
                continue
            progress(f"{contender.name}, getting ready")
            try:
                if one_process and not contender.apart:
                    desk = _method_of(Desk(contender, *copy.deepcopy(built), task))
                else:
                    desk = stack.enter_context(_worker(contender, task, cores, pin))
                errors = desk("errors", str(file))
                refusal = reference.refusal(errors)
                if refusal is None:
                    desk("warm")
                    ready[contender.name] = contender, desk, errors
            except Exception as error:  # a peer's own trouble must not end the measurement of the others
                refusal = f"failed: {_brief(error)}"
            if refusal is not None:
                run.absent[contender.name] = refusal
        del built, reference
        if OURS in ready:
            turns = {name: lambda desk=desk: desk("turn") for name, (_, desk, _) in ready.items()}
            seconds = interleaved(turns, rounds, progress)
            for name, (contender, desk, errors) in ready.items():
                ratio = None if name == OURS else ratios(seconds[name], seconds[OURS])
                peak, pinned, saved = desk("peak"), desk("pinned"), desk("saved")  # saved: runs forward, after the peak
                about = contender.about
                run.entries.append(Entry(name, about, seconds[name], ratio, errors, saved, peak, pinned))
    return run


@contextlib.contextmanager
def _worker(contender: Contender, task: Task, cores: Sequence[int], pin: bool) -> Iterator[Method]:
    what = "resnet_fused.tools.bench.desk:open_desk"
    worker = Worker(what, (contender.name, task), cores, pin and not contender.apart)
    try:
        yield worker
    finally:
        worker.close()


@contextlib.contextmanager
def confined(cores: Sequence[int]) -> Iterator[None]:
    """This process on these cores, with as many threads."""
    threads, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(len(cores))
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def _method_of(desk: Desk) -> Method:
    return lambda name, *given: getattr(desk, name)(*given)


def _brief(error: Exception) -> str:
    """One line that fits a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"
