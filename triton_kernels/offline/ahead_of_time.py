"""Compiles launches for chips that are not there, and reads from the binaries what they will need.

Shapes come as meta tensors, so nothing is computed: the planner lists the launches of a block as it would on the chip,
Triton specialises their arguments as at a real launch (pointers aligned, sizes divisible by 16 where they are) and
compiles for the chip's target. Its wheel carries ptxas and cuobjdump.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from resnet_fused.backends.how import Mode
from resnet_fused.tools.tables import table

from ..device import program
from ..host import occupancy
from ..host.chips import BY_ARCH, Chip
from ..host.launch import Launch
from ..host.policies import Policy
from . import resnet50

DOT = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Binary:
    """One launch compiled for one chip. spills: bytes of stores and loads per thread. dots: instructions by kind.

    multiplies: whether the launch has a matrix product. workers: that fit on a multiprocessor.
    """

    names: tuple[str, ...]
    chip: str
    warps: int
    registers: int
    spills: int
    shared: int
    dots: dict[str, int]
    multiplies: bool
    workers: int


def compile_launch(launch: Launch, chip: Chip) -> Binary:
    target = GPUTarget("cuda", chip.arch, 32)
    backend = make_backend(target)
    kernel = program.run_phases
    bound, specialization, options = _bind(launch, chip.arch)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options | {"debug": False}, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    registers, spills = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Binary(
        launch.names,
        chip.name,
        launch.warps,
        registers,
        spills,
        compiled.metadata.shared,
        {kind: len(re.findall(pattern, ptx)) for kind, pattern in DOT.items()},
        any(kind in (program.CONVOLUTION, program.WEIGHT_GRADIENT) for kind in launch.arguments[2]),
        occupancy.workers(chip, registers, launch.warps, compiled.metadata.shared),
    )


def _bind(launch: Launch, arch: int) -> Any:
    """(arguments by name, what they are specialised to, options), as a launch on the chip would make them."""
    return _binder(arch)(*_aligned(launch.arguments), **launch.options)


def _specialization(launch: Launch, arch: int) -> Any:
    return _bind(launch, arch)[1]


@cache
def _binder(arch: int) -> Any:
    kernel = program.run_phases
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", arch, 32)))


class _Pointer:
    """Stands for a tensor: a dtype and an aligned address."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    @staticmethod
    def data_ptr() -> int:
        return 0


def _aligned(argument: Any) -> Any:
    if isinstance(argument, tuple):
        values = [_aligned(a) for a in argument]
        return type(argument)(*values) if hasattr(argument, "_fields") else tuple(values)
    return _Pointer(argument.dtype) if hasattr(argument, "data_ptr") else argument


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of local memory a thread)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


# --- the launches of ResNet-50 ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Every launch that the heuristics plan for one direction of one kind of block."""

    block: str
    direction: resnet50.Direction
    arch: int
    mode: Mode
    batch: int
    dtype: torch.dtype
    precision: str | None = None  # of float32 products; None: as torch.backends says

    def launches(self) -> list[Launch]:
        shape = next(s for s in resnet50.resnet50() if s.name == self.block)
        recorded: list[Launch] = []
        policy = Policy(BY_ARCH[self.arch], self.mode, submit=recorded.append, precision=self.precision)
        resnet50.plan(shape, self.direction, self.batch, self.dtype, policy)
        return recorded


def arch_number(name: str) -> int:
    """80 for "sm_80"; raises ValueError for an architecture that is unknown here."""
    known = {f"sm_{arch}": arch for arch in BY_ARCH}
    if name not in known:
        raise ValueError(f"unknown architecture {name!r}; accepted: {', '.join(known)}")
    return known[name]


def jobs(
    archs: Sequence[int],
    modes: Sequence[Mode],
    batch: int,
    dtype: torch.dtype,
    precision: str | None = None,
    blocks: Sequence[str] | None = None,
) -> list[Job]:
    """One for each block of ResNet-50 (or of `blocks`, by name) and direction; ValueError for an unknown name."""
    names = [shape.name for shape in resnet50.resnet50()]
    unknown = set(blocks or ()) - set(names)
    if unknown:
        raise ValueError(f"unknown block {sorted(unknown)[0]!r}; accepted: {', '.join(names)}")
    return [
        Job(name, direction, arch, mode, batch, dtype, precision)
        for arch in archs
        for mode in modes
        for name in names
        for direction in resnet50.DIRECTIONS
        if blocks is None or name in blocks
    ]


def compile_all(work: Sequence[Job], processes: int | None = None) -> Iterator[tuple[Job, Binary]]:
    """Compiles what the jobs launch, each kernel once: many shapes share one. In `processes`, by default all cores."""
    seen: set[object] = set()
    tasks: list[tuple[Job, int]] = []
    for job in work:
        for i, launch in enumerate(job.launches()):
            key = (job.arch, launch.warps, launch.cooperative, str(_specialization(launch, job.arch)))
            if key not in seen:
                seen.add(key)
                tasks.append((job, i))
    # a fork after Triton has started threads could hang
    with ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from zip((job for job, _ in tasks), pool.map(_compile_task, tasks), strict=True)


def _compile_task(task: tuple[Job, int]) -> Binary:
    job, index = task
    return compile_launch(job.launches()[index], BY_ARCH[job.arch])


def fault(job: Job, binary: Binary) -> str | None:
    """What keeps a kernel from running well, or at all; None where nothing does."""
    if binary.workers == 0:
        return f"{binary.shared} bytes of shared memory, {binary.chip} has {BY_ARCH[job.arch].shared}"
    if binary.spills:
        return f"{binary.spills} bytes of local memory a thread"
    exact = job.dtype == torch.float32 and job.precision != "tf32"  # tensor cores have no such product
    if binary.multiplies and not exact and not any(binary.dots.values()):
        return "a product without tensor cores"
    return None


def report(results: Iterable[tuple[Job, Binary]]) -> tuple[str, bool]:
    """A table, a row per kernel, and whether all are without fault."""
    rows, good = [], True
    for job, b in results:
        wrong = fault(job, b)
        good &= wrong is None
        name = "+".join(b.names) if len(b.names) == 1 else f"all {len(b.names)} phases"
        tensor_cores = ", ".join(f"{count} {kind}" for kind, count in b.dots.items() if count)
        row = (
                f"sm_{job.arch}", job.block, job.direction, name, b.warps, b.registers, b.spills, b.shared, b.workers,
                tensor_cores or ("none" if b.multiplies else ""), wrong or "",
        )  # fmt: skip
        rows.append(tuple(str(cell) for cell in row))
    header = (
        "arch", "block", "direction", "launch", "warps", "registers", "local B", "shared B", "workers / SM",
        "tensor-core instructions", "fault",
    )  # fmt: skip
    return table(f"{len(rows)} kernels", header, rows), good
