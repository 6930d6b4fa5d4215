"""Every activation in blocks of every order, on the CPU: PyTorch's values, derivatives, kinks and NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block
from support.equivalence import assert_as_accurate
from support.matrix import FORMATS, LOW_PRECISION
from support.named_tensors import is_buffer, leaves, named_tensors
from support.runs import run, run_exact
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops import operators
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import Activation, BlockSpec, StageSpec
from resnet_fused.spec.activations import KINDS
from resnet_fused.spec.block import ORDERS
from resnet_fused.spec.facts import facts

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

activations = pytest.mark.parametrize("act", KINDS)
orders = pytest.mark.parametrize("order", ORDERS)
skips = pytest.mark.parametrize("skip", ["identity", "projection", "none"])
SIZES = {"channels": 6, "width": 5, "size": (4, 5), "bias": True, "branch_scale": "[C]"}


def case_of(act: str, order: str, skip: str, **changes: Any) -> Case:
    scales = {} if skip == "none" else {"skip_scale": "[1]"}
    return block(2, skip, order=order, act=act, **SIZES, **scales, **changes)  # type: ignore[arg-type]


def test_codes_are_the_same_in_every_language() -> None:
    assert operators._C.activations() == list(KINDS)


@activations
@orders
@skips
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "frozen"])
def test_gradient_check(act: str, order: str, skip: str, batch_stats: bool) -> None:
    """Of every tensor, against finite differences in fp64; a seed whose values stay away from kinks."""
    case = case_of(act, order, skip, batch_stats=batch_stats, memory="low" if skip == "projection" else "default")
    x, params, spec = case.build()
    names = [name for name in named_tensors(params) if not is_buffer(name)]

    def compute(x: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return functional.residual_block(x, replaced(params, given), spec, backend="native")

    inputs = named_tensors(leaves(params))
    given = (x.requires_grad_(), *(inputs[name] for name in names))
    assert torch.autograd.gradcheck(compute, given, eps=1e-7, atol=1e-5, rtol=1e-4)


def replaced(params: BlockParams, given: dict[str, Tensor]) -> BlockParams:
    def stage(name: str, tensors: StageParams) -> StageParams:
        found = {n.rpartition(".")[2]: t for n, t in given.items() if n.rpartition(".")[0] == name}
        clones = {n: getattr(tensors, n) for n in ("running_mean", "running_var", "num_batches_tracked")}
        return replace(tensors, **found, **{n: None if t is None else t.clone() for n, t in clones.items()})

    stages = tuple(stage(f"stages.{i}", s) for i, s in enumerate(params.stages))
    projection = params.projection and stage("projection", params.projection)
    scales = {name: given.get(name, getattr(params, name)) for name in ("branch_scale", "skip_scale")}
    return replace(params, stages=stages, projection=projection, **scales)


@activations
@orders
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_as_accurate_as_eager(act: str, order: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Outputs, gradients and statistics; near a kink as far as rounding tells the side."""
    case = case_of(act, order, "identity")
    seeds = range(16 if dtype == torch.float32 else 8)  # of a few digits the largest error is chance
    given = [case.build(dtype, memory_format, seed, torch.float32) for seed in seeds]
    assert_equivalent(given, [case.upstream(dtype, seed) for seed in seeds], "native")


@activations
@orders
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_outputs_are_as_accurate_as_eagers(act: str, order: str, dtype: torch.dtype) -> None:
    case = case_of(act, order, "projection")
    blocks = [case.build(dtype, torch.channels_last, seed, torch.float32) for seed in range(8)]
    got, eager = (torch.stack([run(*b, backend)["out"] for b in blocks]) for backend in ("native", "eager"))  # type: ignore[misc]
    assert_as_accurate("out", got, eager, torch.stack([run_exact(*b)["out"] for b in blocks]))  # type: ignore[misc]


NAN, INF = float("nan"), float("inf")
SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 6.0, 3.0, -3.0, 2.5, -2.5, 7.0, 1e-30, -1e-30, 90.0, -90.0]


@activations
@pytest.mark.parametrize("skip", ["none", "identity"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_kinks_and_what_is_not_finite(act: str, skip: str, dtype: torch.dtype) -> None:
    """Value by value, PyTorch's own; the convolution multiplies by one, and the skip path adds zero times x."""
    x = torch.tensor(SPECIAL, dtype=dtype).reshape(1, 1, 3, 5)
    slope = torch.tensor([0.25], dtype=dtype) if KINDS[act].learned else None
    params = BlockParams((StageParams(torch.ones(1, 1, 1, 1, dtype=dtype), slope=slope),))
    if skip == "identity":
        x = torch.where(x.isinf(), 8.0, x)  # zero times infinity is NaN
        params = replace(params, skip_scale=0.0)
    if act == "gelu":
        x = torch.where(x == INF, 8.0, x)  # where PyTorch's own loops give infinity or NaN, by their dtype
    spec = BlockSpec((StageSpec(norm=False, act=act),), skip)  # type: ignore[arg-type]
    results = []
    for backend in ("native", "eager"):
        leaf = x.clone().requires_grad_()
        out = functional.residual_block(leaf, params, spec, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), [leaf])
        # the gradient at NaN is 0 or 1 in PyTorch's own loops, by their dtype
        results.append((out.detach(), torch.where(x.isnan(), 0.0, grad)))
    torch.testing.assert_close(results[0], results[1], equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(
            functional.residual_block(x, params, spec, backend="native"), results[1][0], equal_nan=True
        )


@pytest.mark.parametrize("size", [1, 6])
def test_slopes_of_one_value_and_of_each_channel(size: int) -> None:
    case = case_of("prelu", "post", "identity")
    x, params, spec = case.build()
    slope = torch.linspace(-0.4, 0.6, size, dtype=torch.float64)
    params = replace(params, stages=(params.stages[0], replace(params.stages[1], slope=slope)))
    got, exact = (run(x, params, spec, backend, case.upstream()) for backend in ("native", "eager"))
    assert got["grad of stages.1.slope"].shape == (size,)  # type: ignore[union-attr]
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-11)


def test_what_backward_reads() -> None:
    def join(act: Activation | str, order: Any = "post", skip: Any = "identity") -> str:
        return facts(BlockSpec((StageSpec(act=act),), skip, order=order)).join

    assert join("relu") == join("relu6") == join("leaky_relu") == "output", "their output tells the derivative"
    assert join("gelu") == join("prelu") == join(Activation("leaky_relu", -0.1)) == "sum"
    assert join("relu", skip="none") == "sum", "made of y alone, which is saved anyway"
    assert join("relu", "branch") == join("gelu", "branch") == "branch"
    assert join("identity") == join("relu", "pre") == join("identity", "branch") == "nothing"


def test_evaluation_of_what_is_not_relu_runs_in_one_pass_more() -> None:
    """Folded weights serve any activation and any order."""
    for act in KINDS:
        for order in ORDERS:
            x, params, spec = case_of(act, order, "projection", batch_stats=False).build(torch.float64)
            with torch.no_grad():
                got, exact = (functional.residual_block(x, params, spec, backend=b) for b in ("native", "eager"))
            torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-11)
