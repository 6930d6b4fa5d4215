"""A gate of known layers in evaluation: one call behind the chain computes mean, layers and join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.blocks import Case, block
from support.equivalence import assert_as_accurate
from support.matrix import FORMATS, LOW_PRECISION
from support.named_tensors import to_double
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import functional
from resnet_fused.ops import join_operators, operators, reference
from resnet_fused.ops.gate import GateLayer, LayeredGate
from resnet_fused.spec import Activation
from resnet_fused.spec.activations import IDENTITY

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

FORMS = [(order, skip) for order in ("post", "branch", "pre") for skip in ("identity", "projection", "none")]
FORMS.remove(("pre", "projection"))  # runs in plain PyTorch
forms = pytest.mark.parametrize(("order", "skip"), FORMS)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
NAMES = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
}


@pytest.fixture(autouse=True)
def without_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def in_pytorch(layers: tuple[GateLayer, ...], pooled: Tensor) -> Tensor:
    for weight, bias, act in layers:
        if weight.dim() == 3:
            z = torch.nn.functional.conv1d(pooled[:, None], weight, bias, padding=weight.shape[2] // 2)[:, 0]
        else:
            z = torch.nn.functional.linear(pooled, weight.flatten(1), bias)
        pooled = NAMES[act](z)
    return pooled


def gate_of(layers: tuple[GateLayer, ...]) -> LayeredGate:
    return LayeredGate(lambda pooled: in_pytorch(layers, pooled), layers)


def squeeze_excitation(channels: int, dtype: torch.dtype, bias: bool = True) -> LayeredGate:
    """The values are drawn in fp64 and rounded, so every dtype sees the same gate."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        fan_in = shape[1] if len(shape) > 1 else 1
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * fan_in**-0.5).to(dtype)

    down, up = drawn(3, channels, 1, 1), drawn(channels, 3, 1, 1)
    biases = (drawn(3), drawn(channels)) if bias else (None, None)
    return gate_of((GateLayer(down, biases[0], "silu"), GateLayer(up, biases[1], "sigmoid")))


def doubled(gate: LayeredGate) -> LayeredGate:
    return gate_of(tuple(GateLayer(w.double(), None if b is None else b.double(), act) for w, b, act in gate.layers))


def case_of(order: str = "post", skip: str = "identity", act: str = "relu", **changes: Any) -> Case:
    sizes: dict[str, Any] = {"channels": 6, "width": 5, "size": (4, 5), "batch_stats": False}
    return block(2, skip, order=order, act=act, **(sizes | changes))  # type: ignore[arg-type]


class Calls(TorchDispatchMode):
    """The operators of the package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("resnet_fused::"):
            self.names.append(func.name().removeprefix("resnet_fused::"))
        return func(*args, **(kwargs or {}))


def calls_of(compute: Callable[[], Tensor]) -> list[str]:
    with Calls() as calls:
        compute()
    return calls.names


@forms
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("act", ["relu", "silu"])
@formats
def test_as_accurate_as_eager(
    order: str, skip: str, act: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    case = case_of(order, skip, act)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(4):
        x, params, spec = case.build(dtype, memory_format, seed)
        gate, before = squeeze_excitation(case.out_shape[1], dtype), x.clone()
        exact = reference.residual_block(x.double(), to_double(params), spec, doubled(gate))
        got, eager = (functional.residual_block(x, params, spec, gate=gate, backend=b) for b in ("native", "eager"))
        for layout in FORMATS:
            assert got.is_contiguous(memory_format=layout) == eager.is_contiguous(memory_format=layout)
        assert torch.equal(x, before)
        found.append((got, eager, exact))
    assert_as_accurate("out", *(torch.stack(each) for each in zip(*found, strict=True)))
    names = calls_of(lambda: functional.residual_block(x, params, spec, gate=gate, backend="native"))
    assert names[-1] == "gate_" and not {"gated_join", "pooled_statistics"} & set(names)


@pytest.mark.parametrize("skip", ["identity", "projection", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(skip: str, dtype: torch.dtype) -> None:
    """The gate's float32 tensors are rounded within the call; no further from fp64 than eager."""
    case = case_of(skip=skip, act="silu")
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(4):
        x, params, spec = case.build(torch.float32, torch.channels_last, seed)
        spec, gate = replace(spec, in_place_add=True), squeeze_excitation(case.out_shape[1], torch.float32)
        exact = reference.residual_block(x.double(), to_double(params), spec, doubled(gate))
        with torch.autocast("cpu", dtype):
            eager = functional.residual_block(x, params, spec, gate=gate, backend="eager")
            with Calls() as calls:
                got = functional.residual_block(x, params, spec, gate=gate, backend="native")
        assert calls.names[-1] == "gate_" and got.dtype == eager.dtype == dtype
        found.append((got, eager, exact))
    assert_as_accurate("out", *(torch.stack(each) for each in zip(*found, strict=True)))


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_layer(act: Any, bias: bool) -> None:
    """Linear layers and one over neighbouring channels, each with every activation."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(3, 7, 4, 5, dtype=torch.float64, generator=generator).contiguous(memory_format=torch.channels_last)
    down, up = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((4, 7), (7, 4)))
    near = torch.randn(1, 1, 5, dtype=torch.float64, generator=generator)
    biases = [torch.randn(n, dtype=torch.float64, generator=generator) if bias else None for n in (4, 7, 1)]
    layers = (GateLayer(down, biases[0], act), GateLayer(up, biases[1], act), GateLayer(near, biases[2], act))
    expected = y * in_pytorch(layers, y.mean((2, 3)))[:, :, None, None]
    join_operators.gate_(y, None, layers, IDENTITY, None)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "size"), [(1, (9, 1)), (5, (1, 1)), (64, (37, 41)), (1030, (1, 7)), (33, (80, 96))]
)
def test_any_size_and_the_same_bits_whatever_the_threads(channels: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    y = (torch.randn(2, channels, *size, generator=generator) + 3).contiguous(memory_format=torch.channels_last)
    skip = torch.randn(y.shape, generator=generator)
    gate = squeeze_excitation(channels, torch.float32)
    exact = torch.relu(y.double() * doubled(gate)(y.double().mean((2, 3)))[:, :, None, None] + skip)
    eager = torch.relu(y * gate(y.mean((2, 3)))[:, :, None, None] + skip)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out = y.clone(memory_format=torch.preserve_format)
        join_operators.gate_(out, skip, gate.layers, Activation("relu"), None)
        results.append(out)
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results)
    assert_as_accurate("out", results[0], eager, exact)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_lost_where_eager_loses_it(
    order: str, skip: str, dtype: torch.dtype, value: float
) -> None:
    case = case_of(order, skip, batch=3)
    x, params, spec = case.build(dtype, torch.channels_last)
    x[1, 2, 1, 1] = value
    gate = squeeze_excitation(case.out_shape[1], dtype)
    got, eager = (functional.residual_block(x, params, spec, gate=gate, backend=b) for b in ("native", "eager"))
    for lost in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(lost(got), lost(eager))
    assert (got[1].isnan().any() or value < 0) and got[0].isfinite().all()


def test_a_weight_written_in_any_way_is_read() -> None:
    x, params, spec = case_of().build(torch.float32, torch.channels_last)
    gate = squeeze_excitation(6, torch.float32)
    before = functional.residual_block(x, params, spec, gate=gate)
    gate.layers[1].weight.data.view(-1)[-1] += 1  # moves no version counter
    after = functional.residual_block(x, params, spec, gate=gate)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, reference.residual_block(x, params, spec, gate))


def names_where(change: str) -> list[str]:
    x, params, spec = case_of(skip_scale="[1]" if change == "scale" else "one").build(torch.float32)
    gate = squeeze_excitation(6, torch.float64 if change == "wider weights" else torch.float32)
    if change == "narrower branch":
        x, params, spec = case_of().build(torch.bfloat16)
        gate = replace(gate, compute=lambda pooled: in_pytorch(gate.layers, pooled.float()))
    if change == "wider weights":
        gate = replace(gate, compute=lambda pooled: in_pytorch(gate.layers, pooled.double()))

    def compute() -> Tensor:
        return functional.residual_block(x, params, spec, gate=gate, backend="native")

    if change == "autograd":
        with torch.enable_grad():
            return calls_of(compute)
    if change == "forward mode":
        with forward_ad.dual_level():
            return calls_of(compute)
    return calls_of(compute)


@pytest.mark.parametrize("change", ["autograd", "scale", "wider weights", "narrower branch", "forward mode"])
def test_where_the_layers_run_in_pytorch(change: str) -> None:
    assert "gate_" in names_where("nothing")
    assert "gate_" not in names_where(change)


def bad(position: int, value: Any, error: type[Exception], message: str) -> Any:
    return pytest.param(position, value, error, message, id=message)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        bad(0, torch.ones(2, 5, 3, 4), ValueError, "y must be channels_last"),
        bad(1, torch.ones(2, 4, 3, 4), ValueError, "skip must be"),
        bad(1, torch.ones(2, 5, 3, 4).double(), TypeError, "skip is Double"),
        bad(2, [], ValueError, "an activation for each of its layers"),
        bad(2, [torch.ones(3, 4), torch.ones(5, 3)], ValueError, r"layer 0 of the gate reads 5 values"),
        bad(2, [torch.ones(3, 5), torch.ones(4, 3)], ValueError, "the gate gives 4 factors for 5 channels"),
        bad(2, [torch.ones(1, 1, 4), torch.ones(1, 1, 3)], ValueError, r"accepted: .*\[1, 1, odd\]"),
        bad(2, [torch.ones(3, 5).double(), torch.ones(5, 3)], TypeError, "a tensor of layer 0 is Double"),
        bad(3, [torch.ones(2), None], ValueError, r"the bias of layer 0 must be \[3\]"),
        bad(4, ["tanh", "relu"], ValueError, "a gate has no activation tanh"),
        bad(5, 99, ValueError, "unknown activation code 99"),
    ],
)
def test_bad_arguments(position: int, value: Any, error: type[Exception], message: str) -> None:
    y = torch.ones(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    given: list[Any] = [y, None, [torch.ones(3, 5), torch.ones(5, 3)], [None, None], ["relu", "sigmoid"], 0, 0.0, None]
    torch.ops.resnet_fused.gate_(*given)
    given[position] = value
    with pytest.raises(error, match=message):
        torch.ops.resnet_fused.gate_(*given)


def test_opcheck() -> None:
    y = torch.ones(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    weights = [torch.ones(3, 5), torch.ones(5, 3)]
    given = (y, None, weights, [None, None], ["relu", "sigmoid"], 0, 0.0, None)
    tests = ("test_schema", "test_faketensor")  # no autograd: it is called without
    torch.library.opcheck(torch.ops.resnet_fused.gate_.default, given, test_utils=tests)


def test_a_block_of_params_keeps_nothing_of_the_gate() -> None:
    """Another gate with the same block is the one that is computed."""
    x, params, spec = case_of().build(torch.float32, torch.channels_last)
    first, second = squeeze_excitation(6, torch.float32), squeeze_excitation(6, torch.float32, bias=False)
    outs = [functional.residual_block(x, params, spec, gate=gate) for gate in (first, second, first)]
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
