"""A gate before the addition: values, gradients, statistics, memory, passes, and what a bad one is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block
from support.gates import SqueezeExcitation
from support.matrix import FORMATS, LOW_PRECISION
from support.named_tensors import is_buffer, leaves, named_tensors
from support.runs import run, run_exact
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import functional
from resnet_fused.errors import BackendError
from resnet_fused.ops import join_operators, operators
from resnet_fused.params import map_tensors
from resnet_fused.spec import Activation
from resnet_fused.spec.activations import KINDS
from resnet_fused.tools.saved_bytes import saved_bytes

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

SIZES: dict[str, Any] = {"channels": 6, "width": 5, "size": (4, 5), "bias": True, "branch_scale": "[C]"}
FORMS = [(order, skip) for order in ("post", "branch", "pre") for skip in ("identity", "projection", "none")]
FORMS.remove(("pre", "projection"))  # runs in plain PyTorch, test_what_has_no_parts
forms = pytest.mark.parametrize(("order", "skip"), FORMS)


def case_of(act: str = "relu", order: str = "post", skip: str = "identity", **changes: Any) -> Case:
    scales = {} if skip == "none" else {"skip_scale": "[1]"}
    return block(2, skip, order=order, act=act, **(SIZES | scales | changes))  # type: ignore[arg-type]


def fixed_gates(images: int, channels: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "[N, C]": (images, channels),
        "[N, 1]": (images, 1),
        "[1, C]": (1, channels),
        "[N]": (images,),
        "[N, C, 1, 1]": (images, channels, 1, 1),
        "[N, 1, 1, 1]": (images, 1, 1, 1),
    }
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("act", "order", "skip", "changes"),
    [("silu", *form, {}) for form in FORMS]
    + [(act, *FORMS[0], {}) for act in ("relu", "prelu")]
    + [("silu", *form, {"memory": "low", "stride": 2, "strides_at": 1}) for form in FORMS if form[1] != "identity"],
)
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "frozen"])
def test_gradient_check(act: str, order: str, skip: str, changes: dict[str, Any], batch_stats: bool) -> None:
    """Of every tensor and of the gate's own weights, against finite differences in fp64."""
    case = case_of(act, order, skip, batch_stats=batch_stats, channels=3, width=2, size=(2, 3), **changes)
    x, params, spec = case.build()
    names = [name for name in named_tensors(params) if not is_buffer(name)]
    gate = SqueezeExcitation.of(case.out_shape[1])

    def compute(x: Tensor, down: Tensor, up: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        changed = map_tensors(params, lambda name, t: t.clone() if is_buffer(name) else given[name])
        return functional.residual_block(x, changed, spec, gate=SqueezeExcitation(down, up), backend="native")

    inputs = named_tensors(leaves(params))
    given = (x, gate.down, gate.up, *(inputs[name] for name in names))
    assert torch.autograd.gradcheck(compute, tuple(t.requires_grad_() for t in given), eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", list(fixed_gates(1, 1)))
@pytest.mark.parametrize("skip", ["identity", "none"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "frozen"])
def test_a_given_gate(form: str, skip: str, batch_stats: bool) -> None:
    case = case_of("silu", skip=skip, batch_stats=batch_stats)
    x, params, spec = case.build()
    gate = fixed_gates(case.batch, case.out_shape[1])[form].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, gate: functional.residual_block(x, params, spec, gate=gate, backend="native"),
        (x.requires_grad_(), gate),
        eps=1e-7,
        atol=1e-5,
        rtol=1e-4,
    )
    expected = functional.residual_block(x, params, spec, gate=gate, backend="eager")
    torch.testing.assert_close(functional.residual_block(x, params, spec, gate=gate), expected)  # fp64: 1e-7


@forms
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_as_accurate_as_eager(order: str, skip: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Outputs, gradients and statistics of what has no kink that rounding could cross."""
    case = case_of("silu", order, skip)
    blocks = [case.build(dtype, memory_format, seed, torch.float32) for seed in range(8)]
    gate = SqueezeExcitation.of(case.out_shape[1], dtype)
    assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in range(8)], "native", gate)


@pytest.mark.parametrize("act", KINDS)
@pytest.mark.parametrize("skip", ["identity", "projection"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "frozen"])
def test_every_activation_gives_eagers_numbers(act: str, skip: str, batch_stats: bool) -> None:
    """In fp64, where rounding takes no value across a kink; 1e-7, since PyTorch has hardsigmoid's sixth in float32."""
    case = case_of(act, skip=skip, batch_stats=batch_stats)
    x, params, spec = case.build()
    gate = SqueezeExcitation.of(case.out_shape[1])
    got, eager = (run(x, params, spec, backend, case.upstream(), gate) for backend in ("native", "eager"))
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-7)


@given(
    st.sampled_from(FORMS),
    st.integers(1, 9),
    st.integers(1, 40),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_size(
    form: tuple[str, str], channels: int, width: int, size: tuple[int, int], batch: int, last: bool
) -> None:
    """Evaluation: odd channels, one pixel, one image."""
    order, skip = form
    case = case_of("relu", order, skip, channels=channels, width=width, size=size, batch=batch, batch_stats=False)
    x, params, spec = case.build(memory_format=FORMATS[last])
    gate = SqueezeExcitation.of(case.out_shape[1])
    got, eager = (run(x, params, spec, backend, gate=gate)["out"] for backend in ("native", "eager"))
    torch.testing.assert_close(got, eager, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]
    for layout in FORMATS:
        assert got.is_contiguous(memory_format=layout) == eager.is_contiguous(memory_format=layout)  # type: ignore[union-attr]


@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gate_of_zeros_skips_nothing(batch_stats: bool, value: float) -> None:
    """Zero times what is not finite is NaN, in eager and here; of other images nothing is touched but by statistics."""
    case = case_of("relu", batch_stats=batch_stats, batch=3)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    x[1, 2, 1, 1] = value
    gate = torch.tensor([1.0, 0.0, 0.0])
    got, eager = (functional.residual_block(x, params, spec, gate=gate, backend=b) for b in ("native", "eager"))
    assert torch.equal(got.isnan(), eager.isnan()) and got[1].isnan().any()
    assert torch.equal(got.isinf(), eager.isinf())


def test_statistics_are_eagers() -> None:
    """The running ones move, the counter counts, in the batch's mode; frozen, nothing is written."""
    case = case_of("relu", momentum=None)
    x, params, spec = case.build()
    gate = SqueezeExcitation.of(case.out_shape[1])
    got, eager = (run(x, params, spec, backend, gate=gate) for backend in ("native", "eager"))
    for name in filter(is_buffer, got):
        torch.testing.assert_close(got[name], eager[name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(got[name], named_tensors(params)[name]), name  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned")
@forms
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
def test_reads_no_uninitialised_memory(order: str, skip: str, dtype: torch.dtype) -> None:
    case = case_of("relu", order, skip)
    x, params, spec = case.build(dtype)
    gate = SqueezeExcitation.of(case.out_shape[1], dtype)
    for name, value in run(x, params, spec, "native", case.upstream(dtype), gate).items():
        assert value is None or value.isfinite().all(), name


class Passes(TorchDispatchMode):
    """The operators that read or write a tensor of `elements` values, but for those that only look at it otherwise."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
        if not func.is_view and any(t.numel() >= self.elements for t in tensors):
            self.names.append(func.name().removeprefix("resnet_fused::"))
        return result


def test_no_other_pass_over_memory() -> None:
    """After the chain: the statistics with the mean that the gate reads, and the join; backward two passes, and the sum
    of the chain's gradient and the skip's."""
    case = block(2, channels=8, width=4, size=(6, 6))
    x, params, spec = case.build(torch.float32, torch.channels_last)
    gate = SqueezeExcitation.of(8, torch.float32)
    x.requires_grad_()
    with Passes(x.numel()) as forward:
        out = functional.residual_block(x, params, spec, gate=gate, backend="native")
    assert forward.names == ["residual_block_forward", "pooled_statistics", "gated_join"]
    dout = torch.ones_like(out)
    with Passes(x.numel()) as backward:
        out.backward(dout)
    assert backward.names == [
        "gated_join_backward",
        "pooled_norm_backward",
        "residual_block_backward",
        "aten::add.Tensor",
    ]


def test_saves_what_the_block_without_a_gate_saves() -> None:
    """And two vectors for each image; `out` is the next block's x, as there."""
    case = block(2, channels=32, width=32, size=(8, 8))
    x, params, spec = case.build(torch.float32, torch.channels_last)
    params, x = leaves(params), x.requires_grad_()
    gate = SqueezeExcitation.of(32, torch.float32).leaf(True)
    plain = saved_bytes(lambda: functional.residual_block(x, params, spec, backend="native"))
    gated = saved_bytes(lambda: functional.residual_block(x, params, spec, gate=gate, backend="native"))
    assert plain <= gated < plain + x.numel() * 4 / 4


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_autocast(train: bool) -> None:
    """A bfloat16 block within a float32 model: eager's dtypes, and no further from fp64 than eager."""
    case = block(2, act="silu", channels=6, width=5, size=(4, 5), batch_stats=train)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    spec = replace(spec, in_place_add=True)
    gate = SqueezeExcitation.of(6, torch.float32)
    exact = run_exact(x, params, spec, gate=gate)["out"]
    errors = []
    for backend in ("native", "eager"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = functional.residual_block(x, leaves(params), spec, gate=gate, backend=backend)
        assert out.dtype == torch.bfloat16
        errors.append(float((out.double() - exact).abs().max()))  # type: ignore[operator]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_compiles_into_one_graph(train: bool) -> None:
    case = case_of("relu", batch_stats=train)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    gate = SqueezeExcitation.of(case.out_shape[1], torch.float32)
    compiled = torch.compile(
        lambda x: functional.residual_block(x, params, spec, gate=gate), fullgraph=True, backend="aot_eager"
    )
    expected = functional.residual_block(x, leaves(params), spec, gate=gate)
    torch.testing.assert_close(compiled(x), expected)  # the same operators


def test_transforms_and_a_projection_before_activation_run_in_pytorch() -> None:
    case = case_of("silu", batch_stats=False)
    x, params, spec = case.build()
    gate = SqueezeExcitation.of(case.out_shape[1])
    _, tangent = torch.func.jvp(lambda x: functional.residual_block(x, params, spec, gate=gate), (x,), (x,))
    assert tangent.isfinite().all()
    x, params, spec = case_of("relu", "pre", "projection").build()
    gate = SqueezeExcitation.of(case.out_shape[1])
    out, eager = (functional.residual_block(x, leaves(params), spec, gate=gate, backend=b) for b in ("auto", "eager"))
    assert torch.equal(out, eager)
    with pytest.raises(BackendError, match="reads what the branch's first norm gives"):
        functional.residual_block(x, params, spec, gate=gate, backend="native")


def test_an_empty_batch() -> None:
    case = case_of("relu", batch_stats=False)
    x, params, spec = case.build()
    gate = SqueezeExcitation.of(case.out_shape[1])
    assert functional.residual_block(x[:0], params, spec, gate=gate).shape == (0, *case.out_shape[1:])


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (torch.ones(2, 7), ValueError, r"the gate is \(2, 7\); accepted for 2 images of 6 channels: \[2, 6\]"),
        (torch.ones(3), ValueError, r"the gate is \(3,\)"),
        (torch.ones(2, 6, 4, 5), ValueError, r"the gate is \(2, 6, 4, 5\)"),
        (torch.ones(2, 6, dtype=torch.long), TypeError, "accepted: floating point"),
        (lambda pooled: None, TypeError, "a function that returns one, got NoneType"),
    ],
    ids=["channels", "images", "pixels", "integers", "nothing"],
)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_gate_that_does_not_fit(gate: Any, error: type[Exception], message: str, backend: str) -> None:
    x, params, spec = case_of().build()
    with pytest.raises(error, match=message):
        functional.residual_block(x, params, spec, gate=gate, backend=backend)


@pytest.mark.parametrize("changed", ["stages.1.norm_weight", "out"])
def test_a_tensor_changed_in_place_before_backward_is_an_error(changed: str) -> None:
    x, params, spec = case_of().build(memory_format=torch.channels_last)
    params = leaves(params)
    out = functional.residual_block(x.requires_grad_(), params, spec, gate=torch.ones(2), backend="native")
    with torch.no_grad():
        (out if changed == "out" else named_tensors(params)[changed]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_say_what_to_do() -> None:
    x, params, spec = case_of("silu").build()
    out = functional.residual_block(x.requires_grad_(), params, spec, gate=torch.ones(2), backend="native")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative of residual_block"):
        grad.sum().backward()


# --- the operators ---------------------------------------------------------------------------------------------------


def arguments(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    y, skip, dout = (torch.randn(2, 5, 3, 4, generator=generator).to(dtype) for _ in range(3))
    y = y.contiguous(memory_format=memory_format)
    mean, var, weight, bias, slope = (torch.rand(5, generator=generator) for _ in range(5))
    norm = (mean, var, weight, bias, 1e-5)
    gate, of_images = torch.rand(2, 5, generator=generator), torch.rand(3, 2, 5, generator=generator).double()
    return {
        "pooled_statistics": (y, None, None, weight, bias, 1e-5, True, True),
        "gated_join": (y, gate, *norm, skip, Activation("silu").code, 0.0, None),
        "gated_join_backward": (dout, None, y, gate, *norm, skip, Activation("prelu").code, 0.0, slope),
        "pooled_norm_backward": (dout, y, gate.to(dtype), of_images, mean.expand(2, 5), *norm, True, [True] * 3),
    }[name]


OPERATORS = ["pooled_statistics", "gated_join", "gated_join_backward", "pooled_norm_backward"]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_opcheck(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, arguments(name, dtype, memory_format))


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("pooled_statistics", {6: False, 7: False}),
        ("gated_join", dict.fromkeys(range(2, 6))),
        ("gated_join_backward", dict.fromkeys([4, 5, 6, 7, 9, 12]) | {10: Activation("identity").code}),
        ("pooled_norm_backward", dict.fromkeys([0, 2, 3, 4, 5, 6]) | {10: False, 11: [True, False, False]}),
    ],
)
def test_opcheck_without_what_may_be_absent(name: str, absent: dict[int, Any]) -> None:
    given = list(arguments(name, torch.float32, torch.channels_last))
    for position, value in absent.items():
        given[position] = value
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, tuple(given))


BAD: list[tuple[str, int, Callable[[Any], Any], type[Exception], str]] = [
    ("pooled_statistics", 0, lambda x: x[0], ValueError, "non-empty"),
    ("pooled_statistics", 0, lambda x: x.long(), TypeError, "accepted: Float"),
    ("pooled_statistics", 3, lambda weight: weight[:4], ValueError, r"weight must be \[5\], got \[4\]"),
    ("gated_join", 1, lambda gate: gate[:, :2], ValueError, r"gate must be \[2, 5\]"),
    ("gated_join", 1, lambda gate: gate.long(), TypeError, "gate is Long; accepted: floating point"),
    ("gated_join", 2, lambda mean: None, ValueError, "mean and var go together"),
    ("gated_join", 3, lambda var: var[:1], ValueError, r"var must be \[5\]"),
    ("gated_join", 7, lambda s: s[:, :4], ValueError, "skip must be"),
    ("gated_join", 7, lambda s: s.double(), TypeError, "skip is Double"),
    ("gated_join", 8, lambda code: 99, ValueError, "unknown activation code 99"),
    ("gated_join", 8, lambda code: Activation("prelu").code, ValueError, "prelu has a slope"),
    ("gated_join_backward", 0, lambda d: d[:1], ValueError, "dout must be"),
    ("gated_join_backward", 12, lambda s: s[:3], ValueError, r"slope must be \[1\] or \[5\]"),
    ("pooled_norm_backward", 0, lambda dz: dz[..., :2], ValueError, "dz must be"),
    ("pooled_norm_backward", 2, lambda d: d[:1], ValueError, r"d_pooled must be \[2, 5\]"),
    ("pooled_norm_backward", 3, lambda h: h[:2], ValueError, r"handoff must be \[3, 2, 5\]"),
    ("pooled_norm_backward", 4, lambda m: m[:1], ValueError, r"means must be \[2, 5\]"),
    ("pooled_norm_backward", 7, lambda weight: None, ValueError, "of the weight, which is None"),
    ("pooled_norm_backward", 8, lambda bias: None, ValueError, "of the bias, which is None"),
]


@pytest.mark.parametrize(("name", "position", "change", "error", "message"), BAD)
def test_bad_arguments(
    name: str, position: int, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    given = list(arguments(name, torch.float32, torch.channels_last))
    given[position] = change(given[position])
    with pytest.raises(error, match=message):
        getattr(torch.ops.resnet_fused, name)(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_the_batch_and_of_its_images(dtype: torch.dtype) -> None:
    """Against fp64; a mean of 1e3 beside a deviation of 1, where sums of squares would lose float32's digits."""
    x = (torch.randn(3, 40, 33, 31, generator=torch.Generator().manual_seed(0)) + 1e3).to(dtype)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    norm = join_operators.JoinNorm(eps=1e-5, of_batch=True)
    statistics, means, pooled = join_operators.pooled_statistics(x, norm, pools=True)
    eps = torch.finfo(statistics.dtype).eps
    assert statistics.dtype == join_operators.arithmetic_dtype(x)
    torch.testing.assert_close(statistics[0].double(), mean, rtol=16 * eps, atol=0)
    torch.testing.assert_close(statistics[1].double(), var, rtol=1e3 * eps, atol=0)  # has 1e-3 of the mean's digits
    torch.testing.assert_close(means.double(), x.double().mean((2, 3)), rtol=16 * eps, atol=0)
    expected = (means.double() - statistics[0].double()) / (statistics[1].double() + 1e-5).sqrt()
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_an_infinite_gate_makes_no_nan_of_a_bias_that_is_absent() -> None:
    y, gate = torch.rand(1, 3, 2, 2) + 1, torch.full((1, 3), float("inf"))
    for norm in (join_operators.JoinNorm(), join_operators.JoinNorm(torch.zeros(3), torch.ones(3), eps=1e-5)):
        out = join_operators.gated_join(y, gate, norm, None, Activation("identity"), None)
        assert torch.equal(out, torch.full_like(y, float("inf")))
