"""Training by the engine's convolutions: csrc/cpu/engine/training.h."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from support.blocks import Case, block, bottleneck, frozen
from support.eager_crashes import eager_may_crash
from support.engine_blocks import chain
from support.engine_runs import in_process, threads
from support.equivalence import relative_error
from support.layouts import LAYOUTS
from support.matrix import FORMATS, family
from support.named_tensors import named_tensors
from support.runs import run, run_exact
from support.training_blocks import (
    FORWARD_ONLY,
    TABLE,
    THREADS,
    WINOGRAD,
    assert_accurate,
    assert_same_from_masters,
    convolutions_of_pytorch,
    results,
)
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops import operators
from resnet_fused.params import map_tensors
from resnet_fused.spec import BlockSpec, StageSpec

NAN, INF = math.nan, math.inf
BF16 = torch.bfloat16
has_tiles = operators.load_error() is None and operators.build_info()["instruction set"].startswith("amx")
tiles = pytest.mark.skipif(not has_tiles, reason="this machine has no AMX")
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
# By what convolves: a kernel of its own for each of these in both directions
KINDS = ("bottleneck, projection", "basic, projection", "pre", "strides behind a norm", "padding of a pixel", "no norm")


@pytest.mark.parametrize("isa", ["amx", "amx_portable", "avx512_bf16"])
def test_every_block_in_every_instruction_set(isa: str, tmp_path: Path) -> None:
    done = in_process(isa, ["-m", "support.training_blocks", str(tmp_path / "results")])
    if "accepted on this processor" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.stdout.strip().endswith("all"), done.stderr[-4000:]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_float32_in_every_instruction_set(isa: str) -> None:
    done = in_process(isa, ["-m", "support.training_blocks", "float32"])
    if "accepted on this processor" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.stdout.strip().endswith(f"all {len(WINOGRAD)}"), done.stderr[-4000:]


def calls_of_float32(case: Case) -> tuple[int, int]:
    """How often a training step calls PyTorch's convolution, and its gradients."""
    x, params, spec = case.build(torch.float32, torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run(x, params, spec, "native", case.upstream(torch.float32))
    names = [event.name for event in profiled.events()]
    return names.count("aten::convolution"), names.count("aten::convolution_backward")


def test_who_convolves_float32() -> None:
    """Of pictures smaller than a patch, and of a small one alone, PyTorch does all."""
    basic = TABLE["basic"]
    assert calls_of_float32(basic) == (0, 0)
    for small in (replace(basic, batch=1), replace(basic, size=(3, 9))):
        forward, backward = calls_of_float32(small)
        assert forward == 2 and backward >= 2


def test_no_picture_of_float32() -> None:
    case = replace(TABLE["no norm"], batch=0, size=(9, 9))
    x, params, spec = case.build(torch.float32, torch.channels_last)
    got = run(x, params, spec, "native", case.upstream(torch.float32))
    for name, value in got.items():
        assert value is None or not value.any(), name


@pytest.mark.parametrize("count", THREADS)
def test_threads_change_no_bit_of_float32(count: int) -> None:
    case = WINOGRAD["many patches"]
    x, params, spec = case.build(torch.float32, torch.channels_last)
    one, several = [], []
    for threads_of, found in ((1, one), (count, several)):
        with threads(threads_of):
            found.append(run(x, params, spec, "native", case.upstream(torch.float32)))
    for name in ("grad of x", "grad of stages.0.weight"):
        assert torch.equal(one[0][name], several[0][name]), name  # type: ignore[arg-type]


@tiles
def test_portable_tiles_compute_what_the_processor_does(tmp_path: Path) -> None:
    """Without a norm, the same bits."""
    found = []
    for isa in ("amx", "amx_portable"):
        done = in_process(isa, ["-m", "support.training_blocks", str(tmp_path / isa), "no norm", "no norm, bias"])
        assert done.stdout.strip().endswith("all"), done.stderr[-4000:]
        found.append(torch.load(tmp_path / isa))
    ours, portable = found
    assert ours.keys() == portable.keys() and len(ours) == 2
    for name, those in ours.items():
        for result, value in those.items():
            assert torch.equal(value, portable[name][result]), f"{name}: {result}"


@tiles
@pytest.mark.parametrize("name", TABLE)
def test_pytorch_convolves_nothing(name: str) -> None:
    assert not convolutions_of_pytorch(TABLE[name])


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_what_has_no_gradient_here(name: str) -> None:
    assert_accurate(FORWARD_ONLY[name])
    assert convolutions_of_pytorch(FORWARD_ONLY[name]) == {"aten::convolution_backward"} or not has_tiles


@formats
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.usefixtures("poisoned")
def test_as_exact_as_eager(name: str, memory_format: torch.memory_format) -> None:
    """Threads are unlike from one block to the next, and from one format to the other."""
    with threads(THREADS[(list(TABLE).index(name) + FORMATS.index(memory_format)) % 3]):
        assert_accurate(TABLE[name], memory_format)


@formats
@pytest.mark.parametrize("name", TABLE)
def test_float32_weights_under_autocast(name: str, memory_format: torch.memory_format) -> None:
    assert_same_from_masters(TABLE[name], memory_format)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chains, identity and projection blocks of channels in multiples of 32."""
    count, skip = draw(st.integers(1, 3)), draw(st.sampled_from(["none", "identity", "projection"]))
    wide = st.sampled_from([32, 64, 96])
    channels = draw(wide)
    pairs = list(product((1, 2, 3), repeat=2))
    stages, kernels, widths, total = [], [], [], (1, 1)
    for i in range(count):
        kernel = (draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 2, 3, 5])))
        stride = (1, 1) if skip == "identity" else draw(st.sampled_from([(1, 1), *pairs]))
        dilation = draw(st.sampled_from([(1, 1), *product((1, 2), repeat=2)]))
        padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
        if skip != "none":
            kernel = (kernel[0] | 1, kernel[1] | 1)
            padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
        norm, batch_stats = draw(st.sampled_from([(True, True), (True, True), (True, False), (False, False)]))
        act = draw(st.sampled_from(["relu", "relu", "identity", "silu"]))
        stages.append(StageSpec(stride, padding, dilation, norm=norm, batch_stats=batch_stats, act=act))
        assume(not eager_may_crash(stages[-1], kernel))
        kernels.append(kernel)
        widths.append(channels if i == count - 1 and skip == "identity" else draw(wide))
        total = (total[0] * stride[0], total[1] * stride[1])
    order = draw(st.sampled_from(["post", "post", "pre"]))
    projection = None
    if skip == "projection":
        assume(total == (1, 1))
        projection = StageSpec(total, norm=order != "pre", act="identity")
        kernels.append((1, 1))
        widths.append(widths[-1])
    case = Case(
        BlockSpec(tuple(stages), skip, projection, order, draw(st.sampled_from(["default", "low"]))),  # type: ignore[arg-type]
        channels,
        tuple(widths),
        tuple(kernels),
        (draw(st.integers(1, 30)), draw(st.integers(1, 30))),
        draw(st.integers(1, 9)),
        bias=draw(st.booleans()),
    )
    assume(all(min(s) >= 1 for s in case.sizes))
    chain_sizes = case.sizes[:count]
    # where oneDNN, and so eager, reads uninitialised memory (`test_onednn`)
    for stage, before, after in zip(stages, [case.size, *chain_sizes], chain_sizes, strict=False):
        assume(stage.stride == (1, 1) or min(*before, *after) > 3)
    assume(all(case.batch * h * w >= 6 for h, w in (case.size, *case.sizes)))
    return case


@settings(family, max_examples=40)
@given(cases(), st.sampled_from(THREADS), st.sampled_from(FORMATS))
def test_any_block(case: Case, count: int, memory_format: torch.memory_format) -> None:
    with threads(count):
        assert_accurate(case, memory_format)


@pytest.mark.parametrize("mean", [10, 100, 1000])
@pytest.mark.parametrize("kernel", [1, 3])
def test_statistics_of_a_mean_beyond_the_deviation(kernel: int, mean: float) -> None:
    """1000: the deviation is lost when y is rounded, and its distance from the mean must not be what was lost."""
    case = chain(64, ((kernel, kernel), 64, StageSpec(1, kernel // 2)), ((1, 1), 32, StageSpec()), size=(9, 8), batch=4)
    pairs = []
    for seed in range(4):
        x, params, spec = case.build(BF16, torch.channels_last, seed)
        x = (x.double() * 0.6 + mean).bfloat16()
        exact = run_exact(x, params, spec)
        pairs.append([run(x, params, spec, "native"), run(x, params, spec, "eager"), exact])
    for name in ("out", "stages.0.running_mean", "stages.0.running_var", "stages.1.running_var"):
        got, eager, exact = (torch.stack([p[i][name] for p in pairs]) for i in range(3))  # type: ignore[misc]
        assert relative_error(got, exact) <= 1.5 * relative_error(eager, exact), name


def test_a_constant_channel_comes_out_of_its_norm_as_the_bias() -> None:
    case = chain(64, ((1, 1), 64, StageSpec(act="identity")), size=(8, 8), batch=3)
    x, params, spec = case.build(BF16, torch.channels_last)
    out = functional.residual_block(torch.full_like(x, 1.1), params, spec, backend="native")
    bias = params.stages[0].norm_bias
    assert bias is not None and torch.equal(out, bias[:, None, None].expand_as(out))


def test_a_constant_gradient_vanishes_behind_its_norm() -> None:
    """dz is the same at every pixel, so its batch norm gives nothing back."""
    case = chain(32, ((1, 1), 64, StageSpec(act="identity")), ((1, 1), 32, StageSpec(norm=False, act="identity")))
    x, params, spec = case.build(BF16, torch.channels_last)
    got = run(x, params, spec, "native", torch.full(case.out_shape, 1.1, dtype=BF16))
    dz = params.stages[1].weight.sum(0).abs().max() * params.stages[0].norm_weight.abs().max()  # type: ignore[union-attr]
    assert float(got["grad of x"].abs().max()) <= 1e-4 * float(dz)  # type: ignore[union-attr]


@tiles
@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("name", TABLE)
def test_the_same_bits_again(name: str, count: int) -> None:
    with threads(count):
        first, second = results(TABLE[name]), results(TABLE[name])
    for key, value in first.items():
        if value is not None:
            assert torch.equal(value, second[key]), key  # type: ignore[arg-type]


@tiles
@pytest.mark.parametrize("count", THREADS)
def test_nothing_leaks_from_earlier_calls(count: int) -> None:
    """Every thread's scratch and the memory of weights and results full of NaN: of this size, of larger ones."""
    expected = {}
    with threads(count):
        for name, case in TABLE.items():
            expected[name] = results(case)
        wide = bottleneck("identity", channels=128, width=128, size=(33, 32), batch=4)
        for name, case in TABLE.items():
            for each in (wide, case):
                x, params, spec = each.build(BF16, torch.channels_last)
                run(torch.full_like(x, NAN), params, spec, "native", torch.full(each.out_shape, NAN, dtype=BF16))
            for key, value in results(case).items():
                assert value is None or torch.equal(value, expected[name][key]), f"{name}: {key}"  # type: ignore[arg-type]


@tiles
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_of_x_and_of_the_gradient_from_above(name: str) -> None:
    for case in (TABLE["bottleneck, projection"], TABLE["pre"], TABLE["no norm"]):
        x, params, spec = case.build(BF16, torch.channels_last)
        dout = case.upstream(BF16).contiguous(memory_format=torch.channels_last)
        expected = run(x, params, spec, "native", dout)
        got = run(LAYOUTS[name](x), params, spec, "native", LAYOUTS[name](dout))
        for key, value in expected.items():
            assert value is None or torch.equal(value, got[key]), key  # type: ignore[arg-type]


@tiles
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "pre, projection", "scales", "bias"])
def test_gradients_asked_for_one_by_one(name: str) -> None:
    """As when all are asked for together: the same bits."""
    case = TABLE[name]
    x, params, spec = case.build(BF16, torch.channels_last)
    dout, everything = case.upstream(BF16), results(case)
    tensors = {"x": x} | {n: t for n, t in named_tensors(params).items() if f"grad of {n}" in everything}
    for wanted, leaf in tensors.items():
        leaf.requires_grad_()
        out = functional.residual_block(x, params, spec, backend="native")
        (got,) = torch.autograd.grad(out, leaf, dout)
        leaf.requires_grad_(False)
        assert torch.equal(got, everything[f"grad of {wanted}"]), wanted  # type: ignore[arg-type]


@tiles
@pytest.mark.parametrize("name", ["low", "low, projection", "pre, strides later", "strides behind a norm"])
def test_what_is_computed_again_is_the_same(name: str) -> None:
    """memory="low" computes a convolution again in backward: the same bits as if it had been kept."""
    case = TABLE[name]
    x, params, spec = case.build(BF16, torch.channels_last)
    dout = case.upstream(BF16)
    low, kept = (run(x, params, spec.with_memory(m), "native", dout) for m in ("low", "default"))
    for key, value in kept.items():
        assert value is None or torch.equal(value, low[key]), key  # type: ignore[arg-type]


def assert_same_is_lost(got: dict[str, Tensor | None], eager: dict[str, Tensor | None], what: str) -> None:
    for name, value in eager.items():
        if value is None or not value.is_floating_point():
            continue
        ours = got[name]
        assert ours is not None and torch.equal(ours.isfinite(), value.isfinite()), f"{what}: {name}"


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "dout", "weight"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_finite_comes_out_where_eager_has_it(
    name: str, statistics: str, where: str, bad: float, dtype: torch.dtype
) -> None:
    case = TABLE[name] if statistics == "batch" else frozen(TABLE[name])
    x, params, spec = case.build(dtype, torch.channels_last)
    dout = case.upstream(dtype)
    position = (0, 3, 1, 2)
    if where == "weight":
        params.stages[0].weight[1, 3, 0, 0] = bad
    else:
        {"x": x, "dout": dout}[where][position] = bad
    got = run(x, params, spec, "native", dout)
    if operators.widens(dtype):  # eager's plain loops multiply the padding's zeros, its float32 does not
        x, dout = x.float(), dout.float()
        params = map_tensors(params, lambda _, t: t.float() if t.dtype == dtype else t)
    assert_same_is_lost(got, run(x, params, spec, "eager", dout), f"{bad} in {where}")


@pytest.mark.parametrize("where", ["x", "dout"])
def test_infinities_of_float32_keep_their_signs(where: str) -> None:
    """Winograd subtracts them from each other: oneDNN has to compute what they reach."""
    stage = StageSpec(1, 1, norm=False, act="identity")
    case = chain(32, ((3, 3), 64, stage), size=(6, 7), batch=2)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    dout = case.upstream(torch.float32)
    {"x": x, "dout": dout}[where][1, 3, 2, 2] = INF
    got, eager = (run(x, params, spec, backend, dout) for backend in ("native", "eager"))
    for name, value in eager.items():
        ours = got[name]
        assert value is None or ours is not None
        for lost in (torch.isnan, torch.isposinf, torch.isneginf):
            assert value is None or torch.equal(lost(ours), lost(value)), f"{name}: {lost}"  # type: ignore[arg-type]
    assert any(value is not None and value.isinf().any() for value in eager.values())


@tiles
@pytest.mark.parametrize("bad", [NAN, INF])
def test_weights_that_are_not_finite_are_left_to_pytorch(bad: float) -> None:
    case = TABLE["no norm"]
    x, params, spec = case.build(BF16, torch.channels_last)
    params.stages[1].weight[0, 0, 0, 0] = bad
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run(x, params, spec, "native", case.upstream(BF16))
    names = [event.name for event in profiled.events()]
    # one of two convolutions in each direction; the other's gradients are not finite
    assert names.count("aten::convolution") == 1 and "aten::convolution_backward" in names


@tiles
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 1), (3, 2)], ids=str)
def test_each_tap_reaches_its_own_pixel(stride: tuple[int, int], kernel: int) -> None:
    """One weight of one tap: y and the gradient of x are shifts of x and of dy."""
    pad = kernel // 2
    stage = StageSpec(stride, pad, norm=False, act="identity")
    case = chain(32, ((kernel, kernel), 32, stage), size=(5, 7), batch=2)
    x, params, spec = case.build(BF16, torch.channels_last)
    weight, dout = params.stages[0].weight, case.upstream(BF16)
    for tap in product(range(kernel), repeat=2):
        weight.zero_()[3, 29, tap[0], tap[1]] = 1
        got = run(x, params, spec, "native", dout)
        expected, gradient = torch.zeros_like(dout), torch.zeros_like(x)
        for y, c in product(range(dout.shape[2]), range(dout.shape[3])):
            row, column = y * stride[0] + tap[0] - pad, c * stride[1] + tap[1] - pad
            if row in range(5) and column in range(7):
                expected[:, 3, y, c] = x[:, 29, row, column]
                gradient[:, 29, row, column] = dout[:, 3, y, c]
        assert torch.equal(got["out"], expected) and torch.equal(got["grad of x"], gradient), tap  # type: ignore[arg-type]


@tiles
@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize(
    ("size", "batch"),
    [((2, 2), 16), ((7, 7), 8), ((40, 41), 1), ((72, 90), 2)],
    ids=["beside", "items", "parts", "bands"],
)
def test_every_row_counts_in_the_statistics_and_sums(size: tuple[int, int], batch: int, count: int) -> None:
    """A single value of x, then of dy, at each of some pixels of each image: it alone makes the sums."""
    conv = StageSpec(1, 1, norm=False, act="identity")
    case = chain(32, ((1, 1), 64, StageSpec(act="identity")), ((3, 3), 32, conv), size=size, batch=batch)
    x, params, spec = case.build(BF16, torch.channels_last)
    first = params.stages[0]
    assert first.norm_weight is not None and first.norm_bias is not None and first.running_mean is not None
    first.weight.zero_()[:32, :, 0, 0] = torch.eye(32)
    params.stages[1].weight.zero_()[:, :32, 1, 1] = torch.eye(32)
    values, rows = batch * size[0] * size[1], [0, size[0] // 2, size[0] - 1]
    with threads(count):
        for image, row, column in product({0, batch // 2, batch - 1}, rows, (0, size[1] - 1)):
            x.zero_()[image, 7, row, column] = 64
            dout = torch.zeros(case.out_shape, dtype=BF16)
            dout[image, 9, row, column] = 3
            first.running_mean.zero_()
            leaf = first.norm_bias.detach().requires_grad_()
            with_leaf = replace(params, stages=(replace(first, norm_bias=leaf, momentum=1.0), params.stages[1]))
            out = functional.residual_block(x, with_leaf, spec, backend="native")
            (gradient,) = torch.autograd.grad(out, leaf, dout)
            mean = torch.zeros(64)
            mean[7] = 64 / values
            assert torch.equal(first.running_mean, mean.bfloat16()), (image, row, column)
            sums = torch.zeros(64)
            sums[9] = 3
            assert torch.equal(gradient, sums.bfloat16()), (image, row, column)


@tiles
@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gradient_that_is_kept_is_each_images_own(kernel: int, count: int) -> None:
    """Each image's share of the weight gradient, which reads what the data gradient has kept, as when it is alone."""
    stages = (StageSpec(batch_stats=False), StageSpec(1, kernel // 2, batch_stats=False), StageSpec(batch_stats=False))
    case = chain(
        64, *(((k, k), 64, stage) for k, stage in zip((1, kernel, 1), stages, strict=True)), size=(6, 5), batch=5
    )
    x, params, spec = case.build(BF16, torch.channels_last)
    dout = case.upstream(BF16)
    with threads(count):
        whole = run(x, params, spec, "native", dout)["grad of stages.1.weight"]
        each = [
            run(x[n : n + 1], params, spec, "native", dout[n : n + 1])["grad of stages.1.weight"]
            for n in range(case.batch)
        ]
    total = sum(t.double() for t in each if t is not None)
    assert whole is not None and isinstance(total, Tensor)
    assert relative_error(whole, total) <= 4 * torch.finfo(BF16).eps


def test_an_empty_batch() -> None:
    case = frozen(block(2, channels=32, width=64, batch=0))
    x, params, spec = case.build(BF16, torch.channels_last)
    got = run(x, params, spec, "native", case.upstream(BF16))
    assert got["out"] is not None and got["out"].shape == case.out_shape
    assert all(t is None or not t.any() for n, t in got.items() if n.startswith("grad of stages"))


@tiles
def test_calls_of_several_threads_at_once() -> None:
    """Each with threads and scratch of its own: the same bits as one after the other."""
    from concurrent.futures import ThreadPoolExecutor

    names = [name for name in TABLE if "," not in name]
    with threads(2):
        expected = [results(TABLE[name]) for name in names]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda name: _in_two_threads(TABLE[name]), names))
    for name, one, other in zip(names, expected, found, strict=True):
        for key, value in one.items():
            assert value is None or torch.equal(value, other[key]), f"{name}: {key}"  # type: ignore[arg-type]


def _in_two_threads(case: Case) -> dict[str, Tensor | None]:
    torch.set_num_threads(2)  # a new thread begins with all of them
    return results(case)
