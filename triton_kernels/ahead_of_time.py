"""Compiles launches for chips that are not there, and reads from the binaries what they will need.

Shapes come as meta tensors, so nothing is computed: the planner lists the launches of a block as it would on the chip,
Triton specialises their arguments as at a real launch (pointers aligned, sizes divisible by 16 where they are) and
compiles for the chip's target. Its wheel carries ptxas and cuobjdump.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from . import occupancy, program
from .chips import Chip
from .launch import Launch

DOT = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Binary:
    """One launch compiled for one chip. spills: bytes of stores and loads a thread. dots: instructions by kind.

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
    bound, specialization, options = _binder(chip.arch)(*_aligned(launch.arguments), **launch.options)
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


@cache
def _binder(arch: int) -> Any:
    kernel = program.run_phases
    return create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", arch, 32))
    )


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
