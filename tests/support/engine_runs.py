"""Runs the table of `engine_blocks` on the CPU's engine, beside eager in the same layout and dtype.

As a program, in the instruction set that RESNET_FUSED_ISA names, which a process decides on once:
``python -m support.engine_runs RESULTS DTYPES [BLOCK ...]`` writes the report of `run_table` to the file RESULTS.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support.engine_blocks import TABLE, THREADS, Entry
from support.equivalence import FLOOR_ULPS, relative_error, root_mean_square_error
from support.layouts import sliced
from support.matrix import FORMATS
from support.named_tensors import to_double
from torch import Tensor

from resnet_fused import functional
from resnet_fused.backends import prepared
from resnet_fused.ops import reference
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_portable")
# How far a single element may be off, in multiples of the furthest of eager's: README's limits.
LIMIT = {torch.float32: 5.0, torch.bfloat16: 2.0, torch.float16: 2.0}
Change = Callable[[Tensor], Tensor]
LAYOUTS: tuple[tuple[torch.memory_format, Change], ...] = (
    (FORMATS[0], lambda x: x),
    (FORMATS[1], lambda x: x),
    (FORMATS[0], sliced),
)


@dataclass
class Report:
    """ratios: rms error over eager's by block; schedules: as PreparedBlock.describe tells; outputs: of one
    thread, by what was run."""

    wrong: list[str] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    schedules: set[str] = field(default_factory=set)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean_ratio(self) -> float:
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_engine(x: Tensor, params: BlockParams, spec: BlockSpec, pool: tuple[int, int, int] | None = None) -> Tensor:
    """The block, and pooling behind it, by the engine: fails where anything else would compute it."""
    assert prepared.reason_against(x, params, spec) is None
    assert prepared.prepared(params, x, spec, pool or ()).finite
    if pool is None:
        return functional.residual_block(x, params, spec, backend="native")
    return functional.residual_block_max_pool2d(x, params, spec, *pool, backend="native")


def schedule_of(x: Tensor, params: BlockParams, spec: BlockSpec, pool: tuple[int, int, int] | None = None) -> str:
    """How inputs like x run, in words."""
    return prepared.prepared(params, x, spec, pool or ()).describe(x)


def in_eager(x: Tensor, params: BlockParams, spec: BlockSpec, pool: tuple[int, int, int] | None = None) -> Tensor:
    out = reference.residual_block(x, params, spec)
    return out if pool is None else F.max_pool2d(out, *pool)


@torch.no_grad()
def run_table(dtype: torch.dtype, report: Report, names: Iterable[str] = TABLE) -> None:
    """Blocks of the table in every batch and number of threads, each batch in another layout of x."""
    for number, name in enumerate(names):
        entry = TABLE[name]
        found = [
            _run(f"{name}, {dtype}, batch of {batch}", entry, dtype, batch, LAYOUTS[(number + turn) % 3], report)
            for turn, batch in enumerate(entry.batches)
        ]
        got, eager, exact = (torch.cat([each.flatten().double() for each in kind]) for kind in zip(*found, strict=True))
        allowed = max(LIMIT[dtype] * relative_error(eager, exact), FLOOR_ULPS * torch.finfo(dtype).eps)
        error = relative_error(got, exact)
        if not error <= allowed:
            report.wrong.append(f"{name}, {dtype}: error {error:.3g} against fp64, allowed {allowed:.3g}")
        floor = torch.finfo(dtype).eps / 8  # of what eager happens to compute exactly
        ours, theirs = (max(root_mean_square_error(value, exact), floor) for value in (got, eager))
        report.ratios[f"{name}, {dtype}"] = ours / theirs


def _run(
    name: str,
    entry: Entry,
    dtype: torch.dtype,
    batch: int,
    layout: tuple[torch.memory_format, Change],
    report: Report,
) -> tuple[Tensor, Tensor, Tensor]:
    """The engine's result, eager's and the exact one; the engine's of the number of threads that is furthest off."""
    memory_format, change = layout
    x, params, spec = replace(entry.case, batch=batch).build(dtype, memory_format, seed=batch)
    exact = in_eager(x.double(), to_double(params), spec, entry.pool)
    x = change(x)
    eager = in_eager(x, params, spec, entry.pool)
    worst, result = -1.0, eager
    for count in THREADS:
        with threads(count):
            got = on_engine(x, params, spec, entry.pool)
            report.schedules.add(schedule_of(x, params, spec, entry.pool))
        if got.dtype != eager.dtype or any(
            got.is_contiguous(memory_format=f) != eager.is_contiguous(memory_format=f) for f in FORMATS
        ):
            report.wrong.append(f"{name}, {count} threads: {got.dtype}, {got.stride()}; eager's {eager.stride()}")
        error = relative_error(got, exact)
        if not error <= worst:
            worst, result = error, got
        if count == 1:
            report.outputs[name] = got
    return result, eager, exact


def report_of(isa: str, dtypes: Iterable[str], folder: Path, *names: str) -> Report:
    """`run_table` in a process that is told to use this instruction set; without names all of the table."""
    results = folder / f"{isa}.pt"
    done = in_process(isa, ["-m", "support.engine_runs", str(results), ",".join(dtypes), *names])
    assert done.returncode == 0, done.stderr[-4000:]
    return Report(**torch.load(results))


def in_process(isa: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Python with these arguments and this instruction set; threads that wait do not spin."""
    environment = {
        **os.environ,
        "RESNET_FUSED_ISA": isa,
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in (str(Path(__file__).parents[1]), *sys.path) if p),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def main() -> None:
    results, dtypes, *names = sys.argv[1:]
    report = Report()
    for dtype in dtypes.split(","):
        run_table(getattr(torch, dtype), report, names or TABLE)
    made: dict[str, Any] = vars(report)
    torch.save(made, results)


if __name__ == "__main__":
    main()
