"""Blocks whose convolutions the engine computes in training: channels are multiples of 32.

As a program, in the instruction set that RESNET_FUSED_ISA names: ``python -m support.training_blocks RESULTS
[BLOCK ...]`` checks every block, or those, and writes what those compute to the file RESULTS. ``float32`` in place of
RESULTS checks those in float32 of which a convolution is computed by Winograd, in both directions.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block, bottleneck, frozen
from support.engine_blocks import chain
from support.engine_runs import threads
from support.equivalence import Results
from support.matrix import FORMATS
from support.named_tensors import named_tensors
from support.runs import run
from torch.profiler import ProfilerActivity, profile

from resnet_fused.params import map_tensors
from resnet_fused.spec import StageSpec

THREADS = (1, 2, 7)
SEEDS = range(3)
# PyTorch's operations that convolve
CONVOLVING = {"aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm"}
SAME, RELU = StageSpec(1, 1), StageSpec()
WIDE = bottleneck("identity", channels=512, width=256, size=(2, 2))


def _table() -> dict[str, Case]:
    same = (3, 3)
    return {
        "bottleneck": bottleneck("identity", channels=64, width=64),
        "bottleneck, projection": bottleneck("projection", channels=64, width=64),
        "bottleneck, projection of one pixel each": bottleneck("projection", channels=64, width=64, stride=1),
        "basic": block(2, channels=32, width=64, size=(8, 8)),
        "basic, projection": block(2, "projection", channels=32, width=64, out_channels=64, stride=2, size=(9, 8)),
        "pre": block(2, order="pre", channels=32, width=64),
        "pre, projection": block(2, "projection", order="pre", channels=32, width=64, out_channels=64, stride=2),
        "pre, strides later": bottleneck("projection", "pre", channels=64, width=64),
        "branch": block(2, order="branch", channels=32, width=64),
        "scales": bottleneck("identity", channels=32, width=64, branch_scale="[C]", skip_scale="0-d"),
        "scales, projection": bottleneck("projection", channels=64, width=64, branch_scale="[C,1,1]", skip_scale="[1]"),
        "low": bottleneck("identity", memory="low", channels=64, width=64),
        "low, projection": bottleneck("projection", memory="low", channels=64, width=64),
        "frozen": frozen(bottleneck("identity", channels=64, width=64)),
        "frozen, projection": frozen(bottleneck("projection", channels=64, width=64)),
        "no norm": block(2, channels=32, width=64, norm=False),
        "no norm, 1x1": bottleneck("identity", channels=32, width=64, act="identity"),
        "bias": block(2, "projection", channels=32, width=64, out_channels=64, stride=2, bias=True),
        "no norm, bias": block(2, channels=32, width=64, norm=False, bias=True),
        "two images side by side": block(2, channels=32, width=64, size=(7, 7), batch=8),
        "outputs shared": replace(WIDE, batch=1),
        "outputs shared, 4x4": replace(WIDE, size=(4, 4), batch=2),
        "parts of an image": bottleneck("projection", channels=64, width=64, size=(40, 41), batch=1),
        "pixels a page apart": bottleneck("identity", channels=2048, width=64, size=(5, 4)),
        "pixels a page apart, projection": bottleneck("projection", channels=2048, width=64, size=(5, 4)),
        "one pixel": bottleneck("projection", channels=64, width=64, stride=1, size=(1, 1), batch=9),
        "row": block(2, channels=32, width=64, size=(1, 19)),
        "column": bottleneck("identity", channels=32, width=64, size=(19, 1)),
        "5x5": block(2, channels=32, width=64, kernel=5),
        "1x3 and 3x1": chain(
            32, ((1, 3), 64, StageSpec(1, (0, 1))), ((3, 1), 32, StageSpec(1, (1, 0))), skip="identity"
        ),
        "2x2": chain(32, ((2, 2), 64, StageSpec(2)), ((2, 2), 32, StageSpec(1, 1))),
        "stride of 3": chain(32, (same, 64, StageSpec(3, 1)), ((2, 2), 32, StageSpec((1, 2), 1)), size=(11, 13)),
        "strides behind a norm": chain(32, ((1, 1), 64, RELU), (same, 32, StageSpec((2, 3), 1)), size=(9, 10)),
        "stride beyond the window": chain(32, ((1, 1), 64, RELU), ((2, 1), 32, StageSpec(3)), size=(8, 8)),
        "dilation": block(2, channels=32, width=64, dilation=(2, 3), size=(9, 8)),
        "no padding": chain(32, (same, 64, RELU), (same, 32, RELU), size=(8, 7)),
        "padding of a pixel": chain(32, ((1, 1), 64, StageSpec(1, 1)), ((1, 1), 32, StageSpec(1, (0, 2)))),
        "padding beyond the window": chain(32, ((2, 2), 64, StageSpec(1, 3)), (same, 32, StageSpec(2, 4))),
        "window beyond the picture": chain(32, ((5, 7), 64, StageSpec(1, (2, 3))), (same, 32, SAME), size=(2, 3)),
        **{
            f"{act}, {order}": block(2, order=order, act=act, channels=32, width=64, size=(4, 5))
            for act in ("identity", "relu6", "leaky_relu", "silu", "prelu")
            for order in ("post", "pre")
        },
    }


TABLE = _table()
# The engine has no gradient of their input.
FORWARD_ONLY = {"strides and dilation": chain(32, ((3, 3), 64, StageSpec(2, 2, 2)), ((1, 1), 32, RELU), size=(11, 9))}


# Of float32 the engine computes 3x3 convolutions with stride 1. The last one's weight gradient takes several groups of
# patches, and several chunks of each.
WINOGRAD = {
    name: case
    for name, case in TABLE.items()
    if any(
        kernel == (3, 3) and stage.geometry == ((1, 1),) * 3 and min(size) >= 4
        for kernel, stage, size in zip(case.kernels, case.spec.convs, case.sizes, strict=True)
    )
} | {"many patches": chain(32, ((3, 3), 64, SAME), size=(66, 71))}


def convolutions_of_pytorch(case: Case) -> set[str]:
    """Which of PyTorch's operations a training step calls."""
    x, params, spec = case.build(torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(x, params, spec, "native", case.upstream(torch.bfloat16))
    return {event.name for event in profiled.events()} & CONVOLVING


def assert_accurate(
    case: Case, memory_format: torch.memory_format = torch.channels_last, dtype: torch.dtype = torch.bfloat16
) -> None:
    blocks = [case.build(dtype, memory_format, seed) for seed in SEEDS]
    assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in SEEDS], "native")


def assert_same_from_masters(case: Case, memory_format: torch.memory_format = torch.channels_last) -> None:
    """Float32 weights and biases under autocast: the bits of their rounded values, and gradients that are float32's."""
    x, given, spec = case.build(torch.float32, memory_format)
    x, dout = x.bfloat16(), case.upstream(torch.bfloat16)
    named = named_tensors(given)
    params = map_tensors(given, lambda _, t: t.bfloat16() if t.is_floating_point() else t)
    masters = map_tensors(params, lambda name, t: named[name] if name.endswith((".weight", ".bias")) else t)
    rounded = run(x, params, spec, "native", dout)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(x, masters, spec, "native", dout)
    for name, value in rounded.items():
        ours = got[name]
        if value is None or ours is None:
            assert value is ours, name
        elif name.endswith((".weight", ".bias")):
            assert ours.dtype == torch.float32 and ours.stride() == value.stride(), name
            assert torch.equal(ours.bfloat16(), value), name
        else:
            assert torch.equal(ours, value), name


def results(case: Case) -> Results:
    x, params, spec = case.build(torch.bfloat16, torch.channels_last)
    return run(x, params, spec, "native", case.upstream(torch.bfloat16))


def main() -> None:
    to, *names = sys.argv[1:]
    if to == "float32":
        for number, case in enumerate(WINOGRAD.values()):
            with threads(THREADS[number % len(THREADS)]):
                assert_accurate(case, FORMATS[number % len(FORMATS)], torch.float32)
        print(f"all {len(WINOGRAD)}")
        return
    for number, name in enumerate(names or TABLE):
        case = TABLE[name]
        assert not convolutions_of_pytorch(case), name
        with threads(THREADS[number % len(THREADS)]):
            assert_accurate(case, FORMATS[number % len(FORMATS)])
            assert_same_from_masters(case, FORMATS[number % len(FORMATS)])
    with threads(1):
        torch.save({name: results(TABLE[name]) for name in names}, to)
    print("all")


if __name__ == "__main__":
    main()
