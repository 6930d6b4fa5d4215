"""Triton's kernels, compiled before anything is timed."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent import futures
from dataclasses import replace
from itertools import product
from typing import Any

from gpu_bench.contestants import FUSED, forced
from gpu_bench.setting import DTYPE, Setting

from resnet_fused.triton_kernels.host import policies
from resnet_fused.triton_kernels.offline import resnet50


def precompile(setting: Setting, seconds: float) -> dict[str, float]:
    """Fills Triton's cache on all cores, from meta tensors; what is left over compiles when it is first called."""
    start = time.monotonic()
    ways = [*(way for backend, *way in FUSED.values() if backend == "triton"), (None, None)]
    batches = sorted(setting.batches, key=lambda batch: batch != setting.main_batch)
    jobs = list(product(batches, ways, setting.shapes().values(), resnet50.DIRECTIONS))
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(os.cpu_count(), context)
    waiting = [pool.submit(_compile, shape, direction, batch, *way) for batch, way, shape, direction in jobs]
    done, _ = futures.wait(waiting, seconds)
    pool.shutdown(cancel_futures=True)
    failed = [text for future in done if (text := str(future.exception() or ""))]
    for text in sorted(set(failed)):
        print(f"not compiled beforehand: {text}", file=sys.stderr)
    return {"seconds": time.monotonic() - start, "jobs": len(jobs), "done": len(done), "failed": len(failed)}


def _compile(
    shape: resnet50.BlockShape, direction: resnet50.Direction, batch: int, mode: str | None, library: str | None
) -> None:
    from resnet_fused.triton_kernels.offline import ahead_of_time

    launches: list[Any] = []
    tensors = shape.tensors(batch, DTYPE)
    assert tensors.x is not None
    weights = [w for w in tensors.weights if w is not None]
    with forced(mode, library):
        policy = replace(policies.choose(shape.spec, tensors.x, weights), submit=launches.append)
    resnet50.plan(shape, direction, batch, DTYPE, policy)
    for launch in launches:
        ahead_of_time.compile_launch(launch, policy.chip)
