"""``--compare``: two versions of this package in turns, once both are right.

A version is a commit of BASE..HEAD, built in a temporary worktree, a wheel, or a folder that holds a built
`resnet_fused`. Each runs in a process of its own. A version that is wrong is named, and then nothing is timed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused.tools.bench import side
from resnet_fused.tools.bench.reference import limit
from resnet_fused.tools.bench.rounds import Progress, Spread, interleaved, ratios
from resnet_fused.tools.bench.task import Task
from resnet_fused.tools.bench.worker import BenchError, Worker
from resnet_fused.tools.tables import table

# what right kernels may be off by even where eager is exact: sums in another order, and a mask that flips
FLOORS = {"output": 1e-4, "statistics": 1e-4, "gradients": 2e-2, "worst gradient": 1e-1}
LABELS = ("base", "head")
Open = Callable[[str, Path], Any]  # (label, folder) -> what answers to `Side`'s methods by name


@dataclass(frozen=True)
class Check:
    """One quantity of one version, "base" or "head": relative errors (see `Side.errors`), and the largest accepted."""

    version: str
    mode: str
    dtype: str
    what: str
    error: float
    eager: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    @property
    def verdict(self) -> str:
        return "ok" if self.ok else "WRONG"


@dataclass(frozen=True)
class Timing:
    """Seconds of each round; ratio: base's / head's, above 1 where head is faster."""

    mode: str
    dtype: str
    base: list[float]
    head: list[float]
    ratio: Spread


@dataclass
class Comparison:
    """base, head: as they were given; timings: none unless every check is ok."""

    base: str
    head: str
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        rows = [
            [c.version, c.mode, c.dtype, c.what, *(f"{x:.1e}" for x in (c.error, c.eager, c.limit)), c.verdict]
            for c in self.checks
        ]
        header = ["version", "mode", "dtype", "of", "fused", "eager", "accepted", ""]
        text = table(f"base {self.base}, head {self.head}: relative errors", header, rows)
        if not self.ok:
            wrong = " and ".join(dict.fromkeys(c.version for c in self.checks if not c.ok))
            return f"{text}\n{wrong} computes something else than PyTorch: nothing was timed"
        rows = [
            [t.mode, t.dtype]
            + [f"{Spread.of(seconds).middle * 1e3:.2f}" for seconds in (t.base, t.head)]
            + [f"{t.ratio.middle:.3f}", f"{t.ratio.low:.3f} to {t.ratio.high:.3f}"]
            for t in self.timings
        ]
        header = ["mode", "dtype", "base ms", "head ms", "base / head", "p20 to p80"]
        return f"{text}\n\n{table('Times in turns', header, rows)}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def compare(
    versions: Sequence[str],
    tasks: Sequence[Task],
    cores: Sequence[int],
    rounds: int,
    pin: bool = True,
    progress: Progress = lambda _: None,
    open_side: Open | None = None,
) -> Comparison:
    """versions: ["BASE..HEAD"], or two wheels or folders, the base first. tasks: alike but for mode and dtype.

    Correctness is checked for every task, and for its mode in float32, which shows what 16 bits hide.

    Raises ValueError for other versions, BenchError if one cannot be built or does not run.
    """
    with contextlib.ExitStack() as stack:
        found = Comparison(*_named(versions))
        folders = stack.enter_context(_built(versions, progress))
        asks = []
        for label, folder in zip(LABELS, folders, strict=True):
            progress(f"{label}, getting ready")
            asks.append(
                open_side(label, folder) if open_side else stack.enter_context(_side(folder, tasks[0], cores, pin))
            )
        wanted = {(task.mode, dtype) for task in tasks for dtype in ("float32", task.dtype)}
        for label, ask in zip(LABELS, asks, strict=True):
            for mode, dtype in sorted(wanted):
                progress(f"{label}, checking {mode}, {dtype}")
                for what, (error, eager) in ask("errors", mode, dtype).items():
                    quantity, _, where = what.partition(",")
                    floor = FLOORS[quantity] * (3 if where else 1)  # where eager float32 is exact, whose masks flip too
                    if "worst" not in what or dtype == "float32":  # in 16 bits a matter of luck
                        found.checks.append(Check(label, mode, dtype, what, error, eager, limit(eager, floor)))
        if not found.ok:
            return found
        for task in tasks:
            for ask in asks:
                ask("ready", task.mode, task.dtype)
            turns = {label: lambda ask=ask: ask("turn") for label, ask in zip(LABELS, asks, strict=True)}
            base, head = interleaved(turns, rounds, progress).values()
            found.timings.append(Timing(task.mode, task.dtype, base, head, ratios(base, head)))
    return found


def _named(versions: Sequence[str]) -> tuple[str, str]:
    """Base and head, for the reader."""
    commits = versions[0].split("..")
    if len(versions) == 1 and len(commits) == 2 and commits[0] and not commits[1].startswith("."):
        return commits[0], commits[1] or "HEAD"
    if len(versions) == 2 and all(
        Path(v).is_dir() or (Path(v).suffix == ".whl" and Path(v).exists()) for v in versions
    ):
        return versions[0], versions[1]
    raise ValueError(
        f"--compare {' '.join(versions)}: accepted are BASE..HEAD, two commits of the repository at hand, or two "
        "wheels or folders with a built resnet_fused, the base first"
    )


@contextlib.contextmanager
def _built(versions: Sequence[str], progress: Progress) -> Iterator[list[Path]]:
    """Folders to import the two versions from."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folders = []
        commits = len(versions) == 1
        for i, version in enumerate(versions[0].split("..") if commits else versions):
            target = Path(temporary, str(i))
            if commits:
                progress(f"building {version or 'HEAD'}")
                stack.enter_context(_worktree(version or "HEAD", target))
            elif Path(version).is_dir():
                target = Path(version).resolve()
            else:
                pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), version]
                _command(pip)
            folders.append(target)
        yield folders


@contextlib.contextmanager
def _worktree(commit: str, target: Path) -> Iterator[None]:
    """A commit of the repository at hand, built in place; for a CPU unless RESNET_FUSED_ARCHS names GPUs."""
    _command(["git", "worktree", "add", "--detach", str(target), commit])
    try:
        link = target / "resnet_fused" / "triton_kernels"
        if not link.exists() and (target / "triton_kernels").exists():
            link.symlink_to("../triton_kernels")  # as an installation has it
        environment = {"RESNET_FUSED_ARCHS": "none"} | os.environ
        _command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], target, environment)
        yield
    finally:
        shutil.rmtree(target, ignore_errors=True)
        _command(["git", "worktree", "prune"])


def _command(arguments: list[str], folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise BenchError(f"`{' '.join(arguments)}` failed: {' '.join(told)}")


@contextlib.contextmanager
def _side(folder: Path, task: Task, cores: Sequence[int], pin: bool) -> Iterator[Worker]:
    given = (task.model, task.batch, task.size, task.threads)
    worker = Worker(f"{side.__file__}:Side", given, cores, pin, path=[str(folder)])
    try:
        where = Path(worker("where")).resolve()
        if not where.is_relative_to(folder.resolve()):
            raise BenchError(f"{folder} has no resnet_fused: what was imported instead is {where}")
        yield worker
    finally:
        worker.close()
