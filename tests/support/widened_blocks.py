"""Blocks whose 16 bits are convolved as float32 in training (csrc/cpu/convolution.h, `widens`).

As a program, in the instruction set that RESNET_FUSED_ISA names: ``python -m support.widened_blocks DTYPE``.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block, bottleneck
from support.engine_runs import threads
from support.matrix import FORMATS
from support.runs import run
from support.training_blocks import CONVOLVING
from torch.profiler import ProfilerActivity, profile

from resnet_fused.ops import operators
from resnet_fused.spec import StageSpec

SEEDS = range(8)
MULTIPLYING = CONVOLVING | {"aten::addmm_"}


def _circular() -> Case:
    stage = StageSpec(1, 1, padding_mode="circular")
    case = block(2, channels=8, width=8)
    return replace(case, spec=replace(case.spec, stages=(stage, stage)))


TABLE = {
    "dx added to the skip path's": bottleneck("identity", channels=16, width=8, size=(12, 13)),
    "projection": bottleneck("projection", channels=16, width=8, size=(12, 13)),
    "low": bottleneck("projection", memory="low", channels=16, width=8),
    "few pixels": bottleneck("projection", channels=16, width=8, stride=1, size=(2, 3)),
    "pre": block(2, order="pre", channels=8, width=12),
    "groups": block(2, channels=8, width=8, groups=4),
    "depthwise": block(2, channels=8, width=8, groups=8, kernel=5),
    "strided depthwise": block(
        2, "projection", channels=16, width=16, out_channels=16, groups=16, stride=2, size=(9, 8)
    ),
    "bias": block(2, channels=8, width=6, norm=False, bias=True),
    "dilation": block(2, channels=8, width=6, dilation=(2, 3), size=(9, 8)),
    "circular": _circular(),
}


def types_multiplied(case: Case, dtype: torch.dtype) -> set[str]:
    """Of what PyTorch's convolutions and matrix products read in a training step."""
    x, params, spec = case.build(dtype, torch.channels_last)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run(x, params, spec, "native", case.upstream(dtype))
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    return {event.dtypes()[0] for event in events if event.name() in MULTIPLYING}


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    assert operators.widens(dtype)
    for number, (name, case) in enumerate(TABLE.items()):
        assert types_multiplied(case, dtype) == {"float"}, name
        with threads(1 + number % 2):
            for memory_format in FORMATS:
                blocks = [case.build(dtype, memory_format, seed) for seed in SEEDS]
                assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in SEEDS], "native")
    print("all")


if __name__ == "__main__":
    main()
