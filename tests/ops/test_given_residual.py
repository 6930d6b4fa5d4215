"""`functional.residual_block` with a tensor to add in place of a skip path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.blocks import block as any_block
from support.equivalence import assert_as_accurate
from support.matrix import FORMATS
from support.named_tensors import to_double
from torch import Tensor

from resnet_fused import functional
from resnet_fused.backends import native
from resnet_fused.ops import gated_block, operators, reference
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec, Order

FP64 = 1e-10  # rounding of sums over some hundred values, 1e-14, and room


def made(act: str = "relu", order: Order = "post", **changes: object) -> tuple[Tensor, BlockParams, BlockSpec, Tensor]:
    x, params, spec = any_block(2, "none", channels=4, order=order).build()
    stages = (*spec.stages[:-1], replace(spec.stages[-1], act=act))
    spec = replace(spec, stages=stages, **changes)  # type: ignore[arg-type]
    out = reference.residual_block(x, params, spec)
    residual = torch.randn(out.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    return x, params, spec, residual


def gradients(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((out * weights).sum(), wanted))


@pytest.mark.parametrize("order", ["post", "branch", "pre"])
@pytest.mark.parametrize("act", ["relu", "silu", "identity"])
def test_result_and_gradients_as_the_reference(act: str, order: Order) -> None:
    x, params, spec, residual = made(act, order)
    wanted = [x.requires_grad_(), residual.requires_grad_(), params.stages[0].weight.requires_grad_()]
    runs = []
    for compute in (reference.residual_block, functional.residual_block):
        out = compute(x, params, spec, residual=residual)
        runs.append([out, *gradients(out, wanted)])
    torch.testing.assert_close(runs[1], runs[0], rtol=FP64, atol=FP64)
    assert not torch.allclose(runs[1][0], reference.residual_block(x, params, spec))


def test_the_backend_adds_it_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, params, spec, residual = made()
    monkeypatch.setattr(reference, "residual_block", None)
    monkeypatch.setattr(reference, "join", None)
    functional.residual_block(x, params, spec, residual=residual)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_residual_of_another_dtype(in_place: bool) -> None:
    """As ``branch += skip`` and ``branch + skip`` do it."""
    x, params, spec, residual = made(in_place_add=in_place)
    x, residual = x.float(), residual.double()
    params = BlockParams(
        tuple(
            replace(s, **{k: v.float() for k, v in vars(s).items() if isinstance(v, Tensor) and v.is_floating_point()})
            for s in params.stages
        )
    )
    out = functional.residual_block(x, params, spec, residual=residual)
    assert out.dtype == (torch.float32 if in_place else torch.float64)
    expected = reference.residual_block(x, params, spec, residual=residual)
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-4, atol=1e-5)  # float32's rounding


def test_errors() -> None:
    x, params, spec, residual = made()
    with pytest.raises(ValueError, match=r"residual is .* the branch gives"):
        functional.residual_block(x, params, spec, residual=residual[:, :, :1])
    x, params, spec = any_block(2, channels=4).build()
    with pytest.raises(ValueError, match=r"spec\.skip is 'identity'"):
        functional.residual_block(x, params, spec, residual=x)


# --- evaluation: the last convolution adds it ------------------------------------------------------------------------


def evaluated(
    dtype: torch.dtype, memory_format: torch.memory_format, act: str = "relu", order: Order = "post", seed: int = 0
) -> tuple[Tensor, BlockParams, BlockSpec, Tensor]:
    case = any_block(2, "none", channels=4, order=order, act=act, batch_stats=False)
    x, params, spec = case.build(dtype, memory_format, seed)
    return x, params, spec, case.upstream(dtype, seed).contiguous(memory_format=memory_format)


@pytest.fixture(params=["oneDNN", "engine"])
def convolves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "for this test" if request.param == "oneDNN" else None
    monkeypatch.setattr(operators, "engine_faster_elsewhere", lambda *_: reason)
    return request.param


@pytest.mark.parametrize("order", ["post", "branch", "pre"])
@pytest.mark.parametrize("act", ["relu", "silu", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_evaluation_as_accurate_as_eager(
    act: str,
    order: Order,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    convolves: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(8):
        x, params, spec, residual = evaluated(dtype, memory_format, act, order, seed)
        exact = reference.residual_block(x.double(), to_double(params), spec, residual=residual.double())
        eager, before = reference.residual_block(x, params, spec, residual=residual), residual.clone()
        with monkeypatch.context() as alone:
            alone.setattr(gated_block, "join", None)
            alone.setattr(reference, "residual_block", None)
            got = functional.residual_block(x, params, spec, residual=residual)
        assert torch.equal(residual, before)
        found.append((got, eager, exact))
    assert_as_accurate("out", *(torch.stack(each) for each in zip(*found, strict=True)))


@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of", ["x", "residual"])
@torch.no_grad()
def test_what_is_not_finite_is_lost_where_eager_loses_it(act: str, value: float, of: str, convolves: str) -> None:
    """oneDNN's ReLU would make a zero of the residual's NaN."""
    x, params, spec, residual = evaluated(torch.float32, torch.channels_last, act)
    (x if of == "x" else residual)[1, 2, 1, 1] = value
    got, eager = (functional.residual_block(x, params, spec, residual=residual, backend=b) for b in ("auto", "eager"))
    for lost in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(lost(got), lost(eager))
    assert not eager.isfinite().all() or value < 0


@torch.no_grad()
def test_evaluation_of_one_block_with_a_residual_and_without(convolves: str) -> None:
    """What is folded of it serves both."""
    x, params, spec, residual = evaluated(torch.float32, torch.channels_last)
    for given in (residual, None, residual):
        got = functional.residual_block(x, params, spec, residual=given)
        torch.testing.assert_close(got, reference.residual_block(x, params, spec, residual=given))


@torch.no_grad()
def test_a_residual_with_a_gradient_keeps_autograd() -> None:
    x, params, spec, residual = evaluated(torch.float32, torch.channels_last)
    with torch.enable_grad():
        out = functional.residual_block(x, params, spec, residual=residual.requires_grad_())
    assert out.requires_grad


@pytest.mark.parametrize("name", ["residual_block_infer", "residual_block_prepared"])
@torch.no_grad()
def test_what_the_operators_refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "for this test" if name == "residual_block_infer" else None
    monkeypatch.setattr(operators, "engine_faster_elsewhere", lambda *_: reason)
    x, params, spec, residual = evaluated(torch.float32, torch.channels_last)
    infer = native.NativeBackend().infer
    with pytest.raises(ValueError, match="residual must be"):
        infer(x, params, spec, residual[:1])
    with pytest.raises(TypeError, match="residual"):
        infer(x, params, spec, residual.double())
    x, params, spec = any_block(2, channels=4, batch_stats=False).build(torch.float32)
    with pytest.raises(ValueError, match=r"without a skip path|takes the place of a skip path"):
        infer(x, params, spec, x)
