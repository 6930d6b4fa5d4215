"""Padding by the picture's own values: circular, reflected, replicated; in both directions as PyTorch does it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from support import operator_arguments
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block, frozen
from support.equivalence import root_mean_square_error
from support.matrix import FORMATS, LOW_PRECISION, family
from support.named_tensors import is_buffer, leaves, named_tensors
from support.padding import MODES, padded
from support.random_blocks import EXACT, cases
from support.runs import run, run_exact
from torch import Tensor, nn

import resnet_fused
from resnet_fused import functional
from resnet_fused.backends import how, prepared
from resnet_fused.errors import BackendError
from resnet_fused.ops import operators, reference, validation
from resnet_fused.ops.encoding import decode, encode
from resnet_fused.params import BlockParams, StageParams, map_tensors
from resnet_fused.spec import BlockSpec, PaddingMode, StageSpec

modes = pytest.mark.parametrize("mode", MODES)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])

# Circular padding may be as wide as the picture, a reflection one less; the last: a border wider than half the picture,
# so that a pixel is copied twice.
WINDOWS = {
    "3x3": (StageSpec(padding=1), (3, 3), (5, 6)),
    "rows only": (StageSpec(padding=(0, 1)), (1, 3), (1, 7)),
    "strides": (StageSpec((2, 1), (1, 2)), (3, 5), (6, 5)),
    "stride beyond a row": (StageSpec((1, 5), 1), (3, 3), (4, 4)),
    "dilation": (StageSpec(padding=2, dilation=2), (3, 3), (5, 4)),
    "groups": (StageSpec(padding=1, groups=2), (3, 3), (4, 5)),
    "wide border": (StageSpec(padding=(3, 2)), (3, 3), (4, 3)),
}


def one(window: str, mode: PaddingMode, batch: int = 2, act: str = "relu") -> Case:
    stage, kernel, size = WINDOWS[window]
    stage = replace(stage, act=act)
    return padded(Case(BlockSpec((stage,), "none"), 4, (4,), (kernel,), size, batch), mode)


@modes
@pytest.mark.parametrize("window", WINDOWS)
def test_the_reference_is_a_convolution_module(window: str, mode: PaddingMode) -> None:
    """nn.Conv2d itself is the oracle of what a padding mode means: bit for bit."""
    stage, kernel, size = WINDOWS[window]
    conv = nn.Conv2d(4, 4, kernel, *stage.geometry, groups=stage.groups, padding_mode=mode).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spec = BlockSpec((replace(stage, norm=False, act="identity", padding_mode=mode),))
    ours = reference.residual_block(x, BlockParams((StageParams(conv.weight, conv.bias),)), spec)
    torch.testing.assert_close(ours, conv(x), rtol=0, atol=0)


@modes
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("order", ["post", "pre", "branch"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_blocks(skip: str, order: str, memory: str, mode: PaddingMode) -> None:
    """fp64 to 1e-10, as in test_gradients.py: rounding leaves a wrong border no room there."""
    for stride, last in product((1, 2) if skip != "identity" else (1,), (False, True)):
        case = padded(block(2, skip, order=order, memory=memory, stride=stride, bias=True, branch_scale="[C]"), mode)  # type: ignore[arg-type]
        x, params, spec = case.build(memory_format=FORMATS[last])
        dout = case.upstream()
        got, exact = run(x, params, spec, "native", dout), run_exact(x, params, spec, dout)
        for name, value in exact.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@modes
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window: str, mode: PaddingMode) -> None:
    """Every window, and a projection that pads, to 1e-10 in fp64."""
    case = one(window, mode)
    stage = case.spec.stages[0]
    projection = replace(stage, act="identity")
    both = replace(case, spec=BlockSpec((stage,), "projection", projection), widths=(4, 4), kernels=case.kernels * 2)
    for each in (case, both):
        x, params, spec = each.build(memory_format=torch.channels_last)
        got, exact = run(x, params, spec, "native", each.upstream()), run_exact(x, params, spec, each.upstream())
        for name, value in exact.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@given(case=cases(**EXACT), mode=st.sampled_from(MODES), seed=st.integers(0, 3), last=st.booleans())
@settings(family, max_examples=60)
def test_family(case: Case, mode: PaddingMode, seed: int, last: bool) -> None:
    """Any block, both directions, to 1e-10 in fp64; what is wider than PyTorch takes is drawn again."""
    case = padded(case, mode)
    x, params, spec = case.build(memory_format=FORMATS[last], seed=seed)
    try:
        validation.check(x, params, spec)
    except ValueError as refused:
        assert "takes at most" in str(refused)
        reject()
    dout = case.upstream(seed=seed)
    got, exact = run(x, params, spec, "native", dout), run_exact(x, params, spec, dout)
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@modes
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_in_bfloat16(window: str, mode: PaddingMode) -> None:
    """oneDNN reads beyond rows that a stride leaves (csrc/cpu/convolution.cpp), so PyTorch is no peer here: against
    fp64, by a root mean square of 2 %, five roundings of 2^-8."""
    case = one(window, mode, batch=3, act="silu")  # a ReLU's mask may flip by a rounding
    for seed in range(4):
        x, params, spec = case.build(torch.bfloat16, torch.channels_last, seed)
        dout = case.upstream(torch.bfloat16, seed)
        got, exact = run(x, params, spec, "native", dout), run_exact(x, params, spec, dout)
        for name, value in exact.items():
            if value is not None and value.is_floating_point():
                found = got[name]
                assert found is not None
                assert root_mean_square_error(found, value) < 0.02, name


@modes
@pytest.mark.parametrize("order", ["post", "pre"])
def test_finite_differences(order: str, mode: PaddingMode) -> None:
    """Gradients of everything by gradcheck. SiLU has no kink that a difference could cross."""
    case = padded(block(2, order=order, act="silu", channels=2, width=2, size=(3, 4), batch=1), mode)  # type: ignore[arg-type]
    x, params, spec = case.build()
    inputs = leaves(params)
    names = [n for n in named_tensors(params) if not is_buffer(n)]

    def compute(x: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        fresh = map_tensors(inputs, lambda n, t: given[n] if n in given else t.clone())
        return functional.residual_block(x, fresh, spec, backend="native")

    every = (x.requires_grad_(), *(named_tensors(inputs)[n] for n in names))
    assert torch.autograd.gradcheck(compute, every, atol=1e-6, rtol=1e-4)


@modes
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["identity", "projection"])
def test_narrow_types(skip: str, order: str, dtype: torch.dtype, mode: PaddingMode) -> None:
    """No further from fp64 than twice PyTorch's own error."""
    stride = 1 if skip == "identity" else 2
    case = padded(block(2, skip, order=order, channels=6, width=8, size=(7, 6), stride=stride), mode)  # type: ignore[arg-type]
    blocks = [case.build(dtype, torch.channels_last, seed) for seed in range(4)]
    assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in range(4)], "native")


@modes
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
def test_evaluation(order: str, dtype: torch.dtype, mode: PaddingMode) -> None:
    """Folding a norm into a convolution leaves its padding right: that is of the input, behind the norm before it.

    Tolerance: eight roundings of the largest value, one for each of the few passes of a folded block.
    """
    for skip, act in product(("none", "identity", "projection"), ("relu", "silu")):
        case = frozen(padded(block(2, skip, order=order, act=act, channels=6, width=4, size=(5, 6)), mode))  # type: ignore[arg-type]
        x, params, spec = case.build(dtype, torch.channels_last)
        with torch.no_grad():
            got, exact = functional.residual_block(x, params, spec), run_exact(x, params, spec)["out"]
        assert exact is not None
        bound = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((got.double() - exact).abs().max()) <= bound, (skip, act)


@modes
@formats
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("weights", FORMATS, ids=["contiguous", "channels_last"])
def test_the_result_has_pytorchs_memory_format(
    weights: torch.memory_format, order: str, memory_format: torch.memory_format, mode: PaddingMode
) -> None:
    """Circular padding makes NCHW of anything in PyTorch; fakes promise the same."""
    for kernel in (1, 3):
        case = padded(block(2, order=order, kernel=kernel), mode)  # type: ignore[arg-type]
        x, params, spec = case.build(torch.float32, memory_format)
        params = map_tensors(params, lambda _, t: t.contiguous(memory_format=weights) if t.dim() == 4 else t)
        ours, theirs = (functional.residual_block(x, params, spec, backend=name) for name in ("native", "eager"))
        assert ours.stride() == theirs.stride()
        with torch.no_grad():
            spec = frozen(case).spec
            ours, theirs = (functional.residual_block(x, params, spec, backend=name) for name in ("native", "eager"))
        assert ours.stride() == theirs.stride()


@modes
@pytest.mark.parametrize("name", ["residual_block_forward", "residual_block_backward", "residual_block_infer"])
def test_the_operators_are_sound(name: str, mode: PaddingMode) -> None:
    case = padded(operator_arguments.CASES["bottleneck"], mode)
    given = operator_arguments.arguments(name, case, torch.float32, torch.channels_last)
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, given)


@modes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_pytorch(bad: float, mode: PaddingMode) -> None:
    """From a corner, so that the border carries it; in both directions."""
    case = padded(block(2, norm=False, size=(5, 6), act="relu", bias=True), mode)
    for train in (True, False):
        x, params, spec = case.build(torch.float32, torch.channels_last)
        x[0, 0, 0, 0] = bad
        if train:
            results = [run(x, params, spec, name, case.upstream(torch.float32)) for name in ("native", "eager")]
        else:
            with torch.no_grad():
                results = [{"out": functional.residual_block(x, params, spec, backend=b)} for b in ("native", "eager")]
        assert not results[0]["out"].isfinite().all()  # type: ignore[union-attr]
        for name, value in results[1].items():
            got = results[0][name]
            assert got is not None and value is not None
            # what overflows to infinity or NaN is the same; elsewhere float32 rounds
            torch.testing.assert_close(got, value, equal_nan=True, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("mode", "size", "padding"),
    [
        ("circular", (1, 1), 1),
        ("circular", (1, 3), (1, 3)),
        ("circular", (2, 2), 2),
        ("reflect", (2, 3), (1, 2)),
        ("reflect", (1, 3), (0, 2)),
        ("replicate", (1, 1), 2),
        ("replicate", (1, 2), (3, 1)),
    ],
)
def test_pictures_no_larger_than_their_border(mode: PaddingMode, size: tuple[int, int], padding: int) -> None:
    stage = StageSpec(padding=padding, padding_mode=mode)
    case = Case(
        BlockSpec((stage,), "none"), 3, (3,), ((3, 3) if size[0] > 1 or mode != "reflect" else (1, 3),), size, 3
    )
    x, params, spec = case.build()
    got, exact = run(x, params, spec, "native", case.upstream()), run_exact(x, params, spec, case.upstream())
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize(
    ("mode", "size", "padding"),
    [("circular", (2, 5), 3), ("circular", (5, 2), (1, 3)), ("reflect", (1, 5), 1), ("reflect", (5, 3), (1, 3))],
)
def test_borders_wider_than_pytorch_takes(mode: PaddingMode, size: tuple[int, int], padding: int, backend: str) -> None:
    """F.pad refuses them too; ours is said before a running statistic is written."""
    stage = StageSpec(padding=1, act="relu")
    wide = StageSpec(padding=padding, padding_mode=mode)
    case = Case(BlockSpec((stage, wide), "none"), 2, (2, 2), ((3, 3), (3, 3)), size)
    x, params, spec = case.build()
    (_, pad, _) = wide.geometry
    with pytest.raises(RuntimeError):
        F.pad(x, (pad[1], pad[1], pad[0], pad[0]), mode=mode)
    before = {n: t.clone() for n, t in named_tensors(params).items()}
    with pytest.raises(
        ValueError, match=rf"stages\[1\]: padding_mode='{mode}' takes at most .* from an input of {size[0]}x"
    ):
        functional.residual_block(x, params, spec, backend=backend)
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(params).items())
    tensors = operator_arguments.autograd.tensors_of(params, x)
    with pytest.raises(ValueError, match="of its own values; at most"):
        operators.residual_block_forward(spec, tensors, operator_arguments.every_gradient(tensors))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="padding_mode must be one of 'zeros', 'circular', 'reflect', 'replicate'"):
        StageSpec(padding_mode="mirror")  # type: ignore[arg-type]


@modes
def test_a_spec_survives_its_encoding(mode: PaddingMode) -> None:
    spec = padded(block(2, "projection", stride=2), mode).spec
    assert decode(*encode(spec)).spec == spec


@modes
def test_gpu_backends_say_why_not(mode: PaddingMode) -> None:
    x, params, spec = padded(block(2), mode).build(torch.float32)
    with pytest.raises(BackendError, match=f"Triton kernels pad with zeros only, the block has padding_mode='{mode}'"):
        functional.residual_block(x, params, spec, backend="triton")
    assert how.refuses_padding("kernels", spec) == f"kernels pad with zeros only, the block has padding_mode='{mode}'"
    assert how.refuses_padding("kernels", padded(block(2, kernel=1), mode).spec) is None
    # a kernel that is called without asking refuses as well
    with pytest.raises(ValueError, match="pad with zeros only"):
        torch.ops.resnet_fused.residual_block_forward.triton(*operator_arguments.forward_arguments(x, params, spec))


def test_padding_of_nothing_is_no_reason() -> None:
    """A 1x1 convolution that pads nothing runs anywhere, whatever its mode."""
    x, params, spec = frozen(padded(block(2, kernel=1), "circular")).build(torch.float32)
    assert not spec.pads_values
    reason = prepared.reason_against(x, params, spec)
    assert reason is None or "pads" not in reason


def test_explain_says_what_evaluation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = resnet_fused.models.resnet18(num_classes=4).eval()
    model.layer1[0].conv1.padding_mode = "circular"
    rows = {row.name: row for row in resnet_fused.explain(resnet_fused.fuse(model))}
    assert rows["layer1.0"].backend == "native"
    assert "evaluation runs oneDNN's convolutions: the CPU engine pads with zeros only" in rows["layer1.0"].reason
    assert "pads" not in rows["layer1.1"].reason
    assert "pads with zeros only" in capsys.readouterr().out
