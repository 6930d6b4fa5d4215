"""Every dtype against the fp64 reference, by the tolerance of tests/support/equivalence.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.block_equivalence import assert_equivalent, vanishing
from support.blocks import Case, block, bottleneck, frozen
from support.eager_crashes import eager_may_crash
from support.engine_blocks import chain
from support.equivalence import FLOOR_ULPS, Results, pooled, root_mean_square_error
from support.layouts import LAYOUTS, sliced
from support.matrix import BACKENDS, FORMATS, LOW_PRECISION, family
from support.random_blocks import cases
from support.runs import run, run_exact
from torch import Tensor

from resnet_fused import functional
from resnet_fused.errors import BackendError
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec, StageSpec

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])

SEEDS = range(8)  # pooled, so that one lucky eager rounding does not set the bar


def check(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    memory_format: torch.memory_format = torch.channels_last,
    norm_dtype: torch.dtype | None = None,
) -> None:
    blocks = [case.build(dtype, memory_format, seed, norm_dtype) for seed in SEEDS]
    assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in SEEDS], backend)


@backends
@dtypes
@formats
@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_bottleneck_shaped(
    skip: str, order: str, act: str, memory_format: torch.memory_format, dtype: torch.dtype, backend: str
) -> None:
    check(bottleneck(skip, order, act, size=(9, 13)), dtype, backend, memory_format)


@backends
@formats
def test_unequal_strides_of_a_1x1_kernel(memory_format: torch.memory_format, backend: str) -> None:
    """Where plain PyTorch may crash (`eager_may_crash`), and so cannot set the bar."""
    spec = BlockSpec((StageSpec((1, 2)), StageSpec((2, 1))), "projection", StageSpec((2, 2), act="identity"))
    case = Case(spec, 6, (6, 6, 6), ((1, 1),) * 3, (7, 6))
    for seed in range(40):
        x, params, _ = case.build(torch.float32, memory_format, seed)
        dout = case.upstream(torch.float32, seed)
        exact = run_exact(x, params, spec, dout)
        for name, value in run(x, params, spec, backend, dout).items():
            if value is not None and value.is_floating_point() and name not in vanishing(spec):
                assert root_mean_square_error(value, exact[name]) < 1e-4, name  # type: ignore[arg-type]


@backends
@dtypes
@given(case=cases(channels=(3, 4, 6, 8), values=48), last=st.booleans(), float_norms=st.booleans())
@settings(family, max_examples=30)
def test_family(case: Case, last: bool, float_norms: bool, dtype: torch.dtype, backend: str) -> None:
    assume(not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    check(case, dtype, backend, FORMATS[last], torch.float32 if float_norms else None)


@backends
@dtypes
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize(
    "case",
    [
        block(2, channels=8, width=6, size=(9, 13), bias=True),
        block(2, channels=6, width=12, groups=3, size=(8, 8)),
        block(2, channels=10, width=10, groups=10, size=(8, 8)),
        block(3, "projection", channels=6, width=6, out_channels=12, stride=2, size=(9, 9), batch_stats=False),
        frozen(bottleneck("projection", channels=8, width=6, size=(9, 9))),
        block(2, "projection", channels=6, width=8, out_channels=12, stride=2, strides_at=1, size=(9, 9)),
        chain(
            6,
            ((1, 1), 12, StageSpec(act="relu6")),
            ((3, 3), 12, StageSpec(2, 1, groups=12, act="relu6")),
            ((1, 1), 8, StageSpec(act="identity")),
            size=(9, 9),
        ),
        block(2, channels=8, branch_scale="[C]", skip_scale="[C,1,1]", size=(8, 8)),
        block(2, "projection", channels=8, branch_scale="0-d", skip_scale="[1]", size=(8, 8)),
        block(2, channels=8, batch=1, size=(13, 9)),
        block(2, channels=8, affine=False, size=(8, 8)),
        block(2, channels=8, norm=False, size=(8, 8), bias=True),
        block(2, channels=8, size=(1, 1), batch=16),
        block(3, "projection", channels=8, size=(1, 1), batch=16, out_channels=16, kernel=1),
    ],
    ids=[
        "bias",
        "groups",
        "depthwise",
        "frozen",
        "frozen, strides later",
        "chain of 2, strides at its end",
        "inverted residual, strides",
        "channel scales",
        "scalar scales",
        "batch of 1",
        "no affine",
        "no norm",
        "1x1 picture",
        "1x1 picture, 1x1 kernels",
    ],
)
def test_variants(case: Case, memory: str, dtype: torch.dtype, backend: str) -> None:
    check(replace(case, spec=case.spec.with_memory(memory)), dtype, backend)  # type: ignore[arg-type]


@backends
@dtypes
@formats
@pytest.mark.parametrize("channels", [1, 3, 5, 17, 67])
def test_channels_off_the_vector_width(
    channels: int, memory_format: torch.memory_format, dtype: torch.dtype, backend: str
) -> None:
    check(block(2, channels=channels, width=channels, size=(7, 5)), dtype, backend, memory_format)
    check(block(2, "none", channels=3, width=2 * channels + 1, out_channels=channels, size=(7, 5)), dtype, backend)


@backends
@dtypes
def test_very_wide(dtype: torch.dtype, backend: str) -> None:
    case = block(2, "projection", channels=1030, width=3, out_channels=1030, kernel=1, size=(5, 3))
    check(case, dtype, backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@formats
def test_large_odd_picture(memory_format: torch.memory_format, dtype: torch.dtype, backend: str) -> None:
    case = block(2, "projection", channels=3, width=5, out_channels=6, stride=2, size=(97, 131), batch=1)
    x, params, spec = case.build(dtype, memory_format)
    assert_equivalent([(x, params, spec)], [case.upstream(dtype)], backend)


@backends
@formats
@pytest.mark.parametrize("order", ["post", "pre"])
def test_mean_far_above_deviation(order: str, memory_format: torch.memory_format, backend: str) -> None:
    """Mean 1e3, deviation 1e-1 in fp32: E[y^2] - E[y]^2 has no digit left, and so has a * y + b carelessly rounded."""
    case = block(2, "none", order=order, channels=6, width=6, size=(11, 9), kernel=1, act="identity")  # type: ignore[arg-type]
    blocks = []
    for seed in SEEDS:
        x, params, spec = case.build(torch.float32, memory_format, seed)
        x = 1e3 + 0.1 * (x - x.mean()) / x.std()
        # positive weights of sum 1 keep mean and deviation of the picture through a 1x1 convolution
        params = map_tensors(
            params, lambda n, t: t.abs() / t.abs().sum(1, keepdim=True) if n.endswith("0.weight") else t
        )
        blocks.append((x, params, spec))
    assert_equivalent(blocks, [case.upstream(torch.float32, seed) for seed in SEEDS], backend)


@backends
@dtypes
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_nan_goes_where_eager_lets_it(order: str, batch_stats: bool, dtype: torch.dtype, backend: str) -> None:
    """One NaN in x: in the outputs that its window reaches, or, with batch statistics, in its whole channels."""
    case = block(2, "identity", order=order, channels=4, size=(9, 8), batch_stats=batch_stats)  # type: ignore[arg-type]
    x, params, spec = case.build(dtype)
    x[1, 2, 4, 3] = torch.nan
    dout = case.upstream(dtype)
    got, eager = run(x, params, spec, backend, dout), run(x, params, spec, "eager", dout)
    assert torch.equal(got["out"].isnan(), eager["out"].isnan()) and got["out"].isnan().any()
    for name, value in eager.items():
        assert torch.equal(got[name].isnan(), value.isnan()), name


@backends
@dtypes
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_nan_survives_evaluation(stages: int, skip: str, order: str, dtype: torch.dtype, backend: str) -> None:
    """The folded path keeps it through every ReLU."""
    case = block(stages, skip, order=order, channels=4, size=(9, 8), batch_stats=False)  # type: ignore[arg-type]
    x, params, spec = case.build(dtype)
    x[1, 2, 4, 3] = torch.nan
    got, eager = run(x, params, spec, backend)["out"], run(x, params, spec, "eager")["out"]
    assert torch.equal(got.isnan(), eager.isnan()) and got.isnan().any()  # type: ignore[union-attr]


@backends
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_infinity_goes_where_eager_lets_it(training: bool, value: float, backend: str) -> None:
    """In fp32; bf16 convolutions of PyTorch differ among themselves in what they make of it."""
    case = block(2, "identity", channels=4, size=(9, 8), batch_stats=False)
    x, params, spec = case.build(torch.float32)
    x[0, 1, 4, 3] = value
    dout = case.upstream(torch.float32) if training else None
    got, eager = (run(x, params, spec, b, dout)["out"] for b in (backend, "eager"))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(eager))


@backends
@dtypes
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity"])
def test_relu_has_no_gradient_at_zero(skip: str, order: str, dtype: torch.dtype, backend: str) -> None:
    """gamma = beta = 0 and x = 0 put every ReLU exactly at 0, where nothing but the skip path may pass."""
    case = block(2, skip, order=order, channels=4, batch_stats=True)  # type: ignore[arg-type]
    x, params, spec = case.build(dtype)
    params = map_tensors(params, lambda n, t: t * 0 if "norm_" in n else t)
    got = run(x * 0, params, spec, backend, case.upstream(dtype))
    through_skip = order == "pre" and skip == "identity"
    for name, value in got.items():
        if name.startswith("grad") and not (through_skip and name == "grad of x"):
            assert value is not None and not value.any(), name
    if through_skip:
        assert torch.equal(got["grad of x"], case.upstream(dtype))


@backends
@dtypes
def test_padding_is_zero_after_the_activation(dtype: torch.dtype, backend: str) -> None:
    """A padded position contributes 0, not act(beta): with x = 0 and beta = 1 a 3x3 mean filter counts the inside."""
    case = block(2, "none", channels=1, width=1, norm=True, batch_stats=False, size=(4, 5))
    x, params, spec = case.build(dtype)

    def plain(name: str, t: Tensor) -> Tensor:
        if name.endswith("norm_bias"):
            return torch.full_like(t, 1 if name.startswith("stages.0") else 0)
        return torch.zeros_like(t) if name.endswith("running_mean") else torch.ones_like(t)

    spec = replace(spec, stages=tuple(replace(s, eps=0.0) for s in spec.stages))
    rows, columns = torch.tensor([2, 3, 3, 2]), torch.tensor([2, 3, 3, 3, 2])
    expected = (rows[:, None] * columns).to(dtype)
    with torch.no_grad():
        inferred = functional.residual_block(x * 0, map_tensors(params, plain), spec, backend=backend)
    trained = run(x * 0, map_tensors(params, plain), spec, backend, case.upstream(dtype))["out"]
    assert torch.equal(inferred[0, 0], expected) and torch.equal(trained[0, 0], expected)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", [1, 2, 3])
@formats
def test_rounds_once_to_nearest_even(
    memory_format: torch.memory_format, step: int, dtype: torch.dtype, backend: str
) -> None:
    """out = x + x/2^k is exact in fp32; with half an ulp (step 1) every second value of a binade is a tie."""
    factor = torch.finfo(dtype).eps * 2.0**-step
    case = block(1, kernel=1, channels=17, norm=False, act="identity", size=(9, 8))
    x, params, spec = case.build(dtype, memory_format)
    eye = torch.eye(17, dtype=dtype)[:, :, None, None]
    params = replace(params, stages=(replace(params.stages[0], weight=eye),), branch_scale=factor)
    dout = case.upstream(dtype).contiguous(memory_format=memory_format)
    x, dout = (t + t.sign() for t in (x, dout))  # at least 1, so that fp16 holds x/2^k to the last bit
    trained = run(x, params, spec, backend, dout)
    for got, value in ((trained["out"], x), (run(x, params, spec, backend)["out"], x), (trained["grad of x"], dout)):
        assert torch.equal(got, (value.double() * (1 + factor)).to(dtype))  # type: ignore[arg-type]


@backends
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weights", "dout", "norms"])
@pytest.mark.parametrize("skip", ["identity", "projection"])
def test_strided_tensors(skip: str, which: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Windows of wider tensors and permuted ones, for each tensor that a caller may hand over."""
    case = block(
        2, skip, channels=6, width=4, size=(6, 5), batch_stats=(True, False, True)[: 2 + (skip == "projection")]
    )
    arrange = LAYOUTS[layout]

    def vector(t: Tensor) -> Tensor:
        return sliced(t.reshape(1, -1, 1, 1))[0, :, 0, 0]

    def change(name: str, t: Tensor) -> Tensor:
        if which == "weights" and t.dim() == 4:
            return arrange(t)
        return vector(t) if which == "norms" and t.dim() == 1 else t

    blocks, douts = [], []
    for seed in SEEDS:
        x, params, spec = case.build(dtype, torch.contiguous_format, seed)
        blocks.append((arrange(x) if which == "x" else x, map_tensors(params, change), spec))
        dout = case.upstream(dtype, seed)
        douts.append(arrange(dout) if which == "dout" else dout)
    assert_equivalent(blocks, douts, backend)


@backends
@dtypes
@formats
@pytest.mark.parametrize("order", ["post", "pre"])
def test_expanded_upstream_gradient(
    order: str, memory_format: torch.memory_format, dtype: torch.dtype, backend: str
) -> None:
    """``out.sum().backward()`` hands over a gradient whose strides are all 0."""
    case = block(2, order=order, channels=6, size=(6, 5), batch_stats=False)  # type: ignore[arg-type]
    douts = [torch.ones((), dtype=dtype).expand(case.out_shape)] * len(SEEDS)
    assert_equivalent([case.build(dtype, memory_format, seed) for seed in SEEDS], douts, backend)


@backends
@dtypes
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("dout_last", [False, True])
def test_mixed_memory_formats(
    x_last: bool, weight_last: bool, dout_last: bool, dtype: torch.dtype, backend: str
) -> None:
    case = block(2, "projection", channels=6, width=5, out_channels=7, size=(6, 5))
    blocks, douts = [], []
    for seed in SEEDS:
        x, params, spec = case.build(dtype, FORMATS[weight_last], seed)
        blocks.append((x.contiguous(memory_format=FORMATS[x_last]), params, spec))
        douts.append(case.upstream(dtype, seed).contiguous(memory_format=FORMATS[dout_last]))
    assert_equivalent(blocks, douts, backend)
    for x, params, spec in blocks:
        out = run(x, params, spec, backend)["out"]
        assert out is not None and out.is_contiguous(memory_format=FORMATS[x_last or weight_last])


@backends
@pytest.mark.usefixtures("poisoned")
@given(case=cases(), last=st.booleans(), dtype=st.sampled_from([torch.float64, *LOW_PRECISION]))
@settings(family, max_examples=60)
def test_reads_no_uninitialised_memory(case: Case, last: bool, dtype: torch.dtype, backend: str) -> None:
    x, params, spec = case.build(dtype, FORMATS[last])
    for name, value in run(x, params, spec, backend, case.upstream(dtype)).items():
        assert value is None or value.isfinite().all(), name
    if not spec.batch_stats:
        assert run(x, params, spec, backend)["out"].isfinite().all()  # type: ignore[union-attr]


@backends
@pytest.mark.usefixtures("poisoned")
def test_poison_reaches_the_operators(backend: str) -> None:
    """The operators' own buffers come from at::empty, so the test above sees into them."""
    case = block(3, "projection", channels=6, out_channels=8)
    x, params, spec = case.build(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(x, params, spec, backend, case.upstream(torch.float32))
    for operator in ("forward", "backward"):
        (event,) = [e for e in profile.events() if e.name == f"resnet_fused::residual_block_{operator}"]
        inside = [
            e.name
            for e in profile.events()
            if e.time_range.start >= event.time_range.start and e.time_range.end <= event.time_range.end
        ]
        assert "aten::empty" in inside and "aten::fill_" in inside, (operator, inside)


@backends
@pytest.mark.parametrize(
    "case", [block(2, order="pre", channels=8), block(2, channels=8)], ids=["pre", "identity skip"]
)
def test_autocast_of_a_float_skip_path(case: Case, backend: str) -> None:
    """Here eager computes the norm or the skip path in fp32: "auto" leaves that to it, a named backend says so."""
    x, params, spec = case.build(torch.float32, torch.channels_last, 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = functional.residual_block(x, params, spec)
        assert out.dtype == functional.residual_block(x, params, spec, backend="eager").dtype
        with pytest.raises(BackendError, match="under autocast"):
            functional.residual_block(x, params, spec, backend=backend)
        assert functional.residual_block(x.bfloat16(), params, spec, backend=backend).dtype == torch.bfloat16


@backends
def test_autocast(backend: str) -> None:
    """Under autocast the convolutions run in bf16, their fp32 weights receive fp32 gradients."""
    case = block(2, "projection", channels=8, width=8, out_channels=8, size=(9, 8))

    def under_autocast(x: Tensor, params: BlockParams, spec: BlockSpec, dout: Tensor, name: str) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x, params, spec, name, dout)

    blocks = [case.build(torch.float32, torch.channels_last, seed) for seed in SEEDS]
    douts = [case.upstream(torch.bfloat16, seed) for seed in SEEDS]
    got = pooled([under_autocast(*b, d, backend) for b, d in zip(blocks, douts, strict=True)])
    eager = pooled([under_autocast(*b, d, "eager") for b, d in zip(blocks, douts, strict=True)])
    exact = pooled([run_exact(*b, d) for b, d in zip(blocks, douts, strict=True)])
    for name, value in exact.items():
        ours, theirs = got[name], eager[name]
        assert ours is not None and theirs is not None and value is not None and ours.dtype == theirs.dtype
        if value.is_floating_point():
            error, peer = (root_mean_square_error(t, value) for t in (ours, theirs))
            assert error <= max(2 * peer, FLOOR_ULPS * torch.finfo(torch.bfloat16).eps), name
    assert got["out"].dtype == torch.bfloat16  # type: ignore[union-attr]
    assert got["grad of stages.0.weight"].dtype == torch.float32  # type: ignore[union-attr]
