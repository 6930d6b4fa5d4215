"""The Triton backend on a GPU: the error rule in every dtype, determinism, graphs, launches, memory.

`make gpu` runs this in parts side by side, because compiling the kernels takes most of the time. Without a GPU,
RESNET_FUSED_TEST_DEVICE=cpu (and TRITON_INTERPRET=1) runs what needs no CUDA, slowly and with fewer seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import test_equivalence
import torch
from blocks import Case, Results, block, map_tensors, run, run_exact
from equivalence import FLOOR_ULPS, relative_error
from test_equivalence import Block, assert_equivalent, in_other_format, pooled, root_mean_square_error
from test_equivalence import poisoned as poisoned  # a fixture
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec

pytest.importorskip("triton")
from resnet_fused.triton_kernels import policies, resnet50

DEVICE = os.environ.get("RESNET_FUSED_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
LAST = torch.channels_last
HALF = torch.bfloat16 if ON_CUDA else torch.float16  # Triton's interpreter cuts bfloat16 off instead of rounding it
SEEDS = range(8 if ON_CUDA else 1)
TF32_ULPS = FLOOR_ULPS * 2**13  # tf32 keeps 10 bits of float32's 23

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="graphs, launches and device memory are CUDA's")

CASES = {
    "plain": block(2, "none", channels=24, width=16, out_channels=32, size=(9, 13)),
    "identity": block(3, channels=32, width=16, size=(10, 8), bias=True),
    "projection": block(3, "projection", channels=16, width=24, out_channels=40, stride=2, size=(11, 9)),
    "pre": block(2, order="pre", channels=24, width=16, size=(9, 8)),
    "pre projection": block(
        2, "projection", order="pre", channels=16, out_channels=24, width=16, stride=2, size=(9, 8)
    ),
    "low": block(3, "projection", memory="low", channels=16, width=16, out_channels=32, size=(8, 9)),
    "channel scales": block(2, channels=16, width=16, branch_scale="[C]", skip_scale="[C,1,1]", size=(8, 8)),
    "scalar scales": block(2, channels=16, width=16, branch_scale="0-d", skip_scale="float", size=(8, 8)),
    "groups": block(2, channels=24, width=48, groups=3, size=(8, 8)),
    "depthwise": block(2, channels=20, width=20, groups=20, size=(8, 8)),
    "dilation": block(2, channels=16, width=16, dilation=2, size=(11, 10)),
    "odd": block(2, channels=17, width=13, size=(7, 5), batch=3),
}
ARITHMETIC = {
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
}
SHAPES = {f"{s.size[0]}x{s.size[1]}": s for s in resnet50.resnet50() if s.spec.skip == "identity"}
modes = pytest.mark.parametrize("mode", ["single", "phased"])


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(params=ARITHMETIC)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Of activations; for float32 the precision of products, eager's and ours, is set with it."""
    chosen, precision = ARITHMETIC[request.param]
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = precision
    if precision == "tf32":
        monkeypatch.setattr(test_equivalence, "FLOOR_ULPS", TF32_ULPS)  # cuDNN may decline tf32 and set no bar
    yield chosen
    for s, old in zip(settings, before, strict=True):
        s.fp32_precision = old


def on(device: torch.device, x: Tensor, params: BlockParams, spec: BlockSpec) -> Block:
    return x.to(device), map_tensors(params, lambda _, t: t.to(device)), spec


def built(
    case: Case, device: torch.device, dtype: torch.dtype, seeds: range = SEEDS, norm_dtype: torch.dtype | None = None
) -> tuple[list[Block], list[Tensor]]:
    """(blocks, upstream gradients), channels_last."""
    blocks = [on(device, *case.build(dtype, LAST, seed, norm_dtype)) for seed in seeds]
    douts = [case.upstream(dtype, seed).contiguous(memory_format=LAST).to(device) for seed in seeds]
    return blocks, douts


def frozen(case: Case) -> Case:
    """The block in evaluation."""
    projection = case.spec.projection
    return replace(
        case,
        spec=replace(
            case.spec,
            stages=tuple(replace(s, batch_stats=False) for s in case.spec.stages),
            projection=None if projection is None else replace(projection, batch_stats=False),
        ),
    )


def without_relu(case: Case) -> Case:
    stages = tuple(replace(s, act="identity") for s in case.spec.stages)
    return replace(case, spec=replace(case.spec, stages=stages))


def fitting(case: Case, request: pytest.FixtureRequest) -> Case:
    """Without ReLU in tf32: where cuDNN declines tf32, eager's roundings do not tell which of our masks may flip."""
    return without_relu(case) if "tf32" in request.node.callspec.id else case


def bottleneck(size: str) -> Case:
    """An identity bottleneck of ResNet-50 at batch 4; on the CPU a tenth of it."""
    shape, part = SHAPES[size], 1 if ON_CUDA else 16
    widths = tuple(k // part for k, _, _ in shape.convs)
    picture = (7, 7) if not ON_CUDA else shape.size
    return Case(shape.spec, shape.channels // part, widths, ((1, 1), (3, 3), (1, 1)), picture, 4 if ON_CUDA else 1)


def assert_same_bits(first: Results, other: Results) -> None:
    for name, value in first.items():
        assert value is None or torch.equal(value, other[name]), name  # type: ignore[arg-type]


# --- the error rule --------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("name", CASES)
def test_family_in_training(
    name: str, mode: str, dtype: torch.dtype, device: torch.device, request: pytest.FixtureRequest
) -> None:
    with policies.launch_mode(mode), policies.library_convolutions("none"):  # type: ignore[arg-type]
        assert_equivalent(*built(fitting(CASES[name], request), device, dtype), "triton")


@modes
@pytest.mark.parametrize("name", CASES)
def test_family_in_evaluation(name: str, mode: str, dtype: torch.dtype, device: torch.device) -> None:
    blocks, _ = built(frozen(CASES[name]), device, dtype)
    with policies.launch_mode(mode), policies.library_convolutions("none"):  # type: ignore[arg-type]
        got = pooled([run(*b, "triton") for b in blocks])["out"]
    exact = pooled([run_exact(*b) for b in blocks])["out"]
    peers = [
        pooled([run(*b, "eager") for b in blocks])["out"],
        pooled([run(*in_other_format(x, params), spec, "eager") for x, params, spec in blocks])["out"],
    ]
    assert got is not None and exact is not None and got.dtype == dtype
    allowed = max(2 * max(relative_error(p, exact) for p in peers if p is not None), floor(dtype))
    assert relative_error(got, exact) <= allowed


def floor(dtype: torch.dtype) -> float:
    return test_equivalence.FLOOR_ULPS * torch.finfo(dtype).eps


@modes
@pytest.mark.parametrize("library", ["spatial", "all"])
def test_library_convolutions_between_launches(library: str, mode: str, device: torch.device) -> None:
    with policies.launch_mode(mode), policies.library_convolutions(library):  # type: ignore[arg-type]
        assert_equivalent(*built(CASES["projection"], device, torch.float16), "triton")


@modes
@pytest.mark.parametrize("size", SHAPES)
def test_bottleneck_of_resnet50(size: str, mode: str, device: torch.device) -> None:
    """Accurate, and the same bits in every run, in training and in evaluation."""
    blocks, douts = built(bottleneck(size), device, HALF, range(3 if ON_CUDA else 8), torch.float32)
    still, _ = built(frozen(bottleneck(size)), device, HALF, range(1), torch.float32)
    with policies.launch_mode(mode), policies.library_convolutions("none"):  # type: ignore[arg-type]
        assert_equivalent(blocks, douts, "triton")
        first, inferred = run(*blocks[0], "triton", douts[0]), run(*still[0], "triton")
        for _ in range(3 if ON_CUDA else 1):
            assert_same_bits(first, run(*blocks[0], "triton", douts[0]))
            assert_same_bits(inferred, run(*still[0], "triton"))
    eager, exact = run(*still[0], "eager")["out"], run_exact(*still[0])["out"]
    error, peer = (root_mean_square_error(t, exact) for t in (inferred["out"], eager))  # type: ignore[arg-type]
    assert error <= max(2 * peer, floor(HALF))


# --- determinism -----------------------------------------------------------------------------------------------------


def test_same_bits_under_load(device: torch.device) -> None:
    """Another stream keeps multiprocessors busy, so workers of a launch start and end in another order each time."""
    (given,), (dout,) = built(bottleneck("14x14"), device, HALF, range(1), torch.float32)
    (still,), _ = built(frozen(bottleneck("14x14")), device, HALF, range(1), torch.float32)
    with policies.launch_mode("single"), policies.library_convolutions("none"):
        first, inferred = run(*given, "triton", dout), run(*still, "triton")
        for turn in range(20 if ON_CUDA else 1):
            if ON_CUDA:
                occupy(device, turn)
            assert_same_bits(first, run(*given, "triton", dout))
            assert_same_bits(inferred, run(*still, "triton"))


def occupy(device: torch.device, turn: int) -> None:
    a = torch.ones(1024 + 512 * (turn % 4), 2048, device=device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(20):
            a.mT @ a
    a.record_stream(stream)


@pytest.mark.usefixtures("poisoned")
@modes
@pytest.mark.parametrize("name", ["identity", "projection", "pre", "low", "groups", "odd"])
def test_poisoned_memory_is_never_read(name: str, mode: str, device: torch.device) -> None:
    case = CASES[name]
    assert torch.empty(3, device=device).isnan().all()
    (given,), (dout,) = built(case, device, torch.float16, range(1))
    (still,), _ = built(frozen(case), device, torch.float16, range(1))
    with policies.launch_mode(mode), policies.library_convolutions("none"):  # type: ignore[arg-type]
        for results in (run(*given, "triton", dout), run(*still, "triton")):
            for result, value in results.items():
                assert value is None or value.isfinite().all(), result


# --- CUDA only -------------------------------------------------------------------------------------------------------


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of a step, warmed up as PyTorch asks for, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@cuda_only
@modes
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_captured_graph_replays_the_same_bits(training: bool, mode: str, device: torch.device) -> None:
    case = bottleneck("14x14") if training else frozen(bottleneck("14x14"))
    ((x, params, spec),), (dout,) = built(case, device, torch.bfloat16, range(1), torch.float32)
    x.requires_grad_(training)
    params.stages[1].weight.requires_grad_(training)

    def step() -> tuple[Tensor, ...]:
        out = functional.residual_block(x, params, spec, backend="triton")
        if not training:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, (x, params.stages[1].weight), dout))

    with policies.launch_mode(mode), policies.library_convolutions("none"):  # type: ignore[arg-type]
        expected = [t.clone() for t in step()]
        graph, results = captured(step)
    for _ in range(3):
        for t in results:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def launches(call: Callable[[], object]) -> int:
    """How often the Triton kernel is launched; the rest (running statistics, copies) is not counted."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels, "the profiler saw no kernel"
    return sum("run_phases" in name for name in kernels)


@cuda_only
def test_one_launch_a_direction(device: torch.device) -> None:
    ((x, params, spec),), (dout,) = built(bottleneck("14x14"), device, torch.bfloat16, range(1), torch.float32)
    (still,), _ = built(frozen(bottleneck("14x14")), device, torch.bfloat16, range(1), torch.float32)
    weights = [s.weight.requires_grad_() for s in params.stages]
    x.requires_grad_()
    with policies.launch_mode("single"), policies.library_convolutions("none"):
        out = functional.residual_block(x, params, spec, backend="triton")
        assert launches(lambda: functional.residual_block(x, params, spec, backend="triton")) == 1
        assert launches(lambda: torch.autograd.grad(out, (x, *weights), dout, retain_graph=True)) == 1
        assert launches(lambda: functional.residual_block(*still, backend="triton")) == 1


@cuda_only
@modes
def test_more_elements_than_int32_counts(mode: str, device: torch.device) -> None:
    """Frozen norms keep the pictures apart, so that a few of them can be held against eager alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 70e9:
        pytest.skip(f"needs 70 GB of free device memory, {free / 1e9:.0f} GB are")
    case = frozen(block(2, channels=64, width=16, kernel=1, size=(256, 256)))
    _, params, spec = on(device, *case.build(torch.bfloat16, LAST))
    batch = 2**31 // (64 * 256 * 256) + 8
    x, dout = (torch.empty(batch, 64, 256, 256, dtype=torch.bfloat16, device=device, memory_format=LAST) for _ in "ab")
    generator = torch.Generator(device).manual_seed(0)
    x.normal_(generator=generator)
    dout.normal_(generator=generator)
    assert x.numel() > 2**31
    with policies.launch_mode(mode), policies.library_convolutions("none"):  # type: ignore[arg-type]
        got = run(x, params, spec, "triton", dout)
        inferred = run(x, params, spec, "triton")["out"]
    summed = 0.0
    for part in torch.arange(batch).split(20):
        a, d = (t[part[0] : part[-1] + 1] for t in (x, dout))
        eager = run(a, params, spec, "eager", d)
        summed = summed + eager["grad of stages.0.weight"].double()  # type: ignore[union-attr]
        if part[0] > 0 and part[-1] < batch - 1:
            continue
        exact = run_exact(a, params, spec, d)
        for name, ours in (("out", got["out"]), ("grad of x", got["grad of x"]), ("out", inferred)):
            value = ours[part[0] : part[-1] + 1]  # type: ignore[index]
            error, peer = (root_mean_square_error(t, exact[name]) for t in (value, eager[name]))  # type: ignore[arg-type]
            assert error <= 2 * peer, f"{name} of pictures {part[0]} to {part[-1]}"
    grad = got["grad of stages.0.weight"]
    assert root_mean_square_error(grad, summed) <= floor(torch.bfloat16)  # type: ignore[arg-type]
