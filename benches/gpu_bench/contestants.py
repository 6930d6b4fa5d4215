"""Who takes turns: the names of the ways to run a block, a network or a pass, and what makes each of them run so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from gpu_bench.clock import Step
from torch import nn

from resnet_fused.backends import how

PEER = "eager"
BENCHMARKED = "eager, cudnn.benchmark"
FUSED = {
    f"{backend} {name}": (backend, *way)
    for backend in ("native", "triton")
    for name, way in {
        "single": ("single", "none"),
        "phased": ("phased", "none"),
        "hybrid": ("phased", "spatial"),
    }.items()
}
GRAPH = ", CUDA graph"
COMPILED = {
    "torch.compile": None,
    f"torch.compile{GRAPH}": "reduce-overhead",
    "torch.compile, max-autotune": "max-autotune",
}
NETWORKS = {"fused auto": "auto", "fused native": "native", "fused triton": "triton"}
GRAPHED = ("fused auto", f"fused auto{GRAPH}", "torch.compile", f"torch.compile{GRAPH}")
PASS = "batch_norm_act"


def compiled(module: nn.Module | Step, contestant: str, dry: bool) -> Any:
    if dry:
        return torch.compile(module, dynamic=False, backend="aot_eager")  # a dry run compiles no C++
    return torch.compile(module, dynamic=False, mode=COMPILED[contestant])


@contextlib.contextmanager
def forced(mode: str | None, library: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(how.launch_mode(mode))  # type: ignore[arg-type]
        if library is not None:
            stack.enter_context(how.library_convolutions(library))  # type: ignore[arg-type]
        yield
