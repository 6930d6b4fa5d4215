"""`functional.residual_block` with a tensor to add in place of a skip path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.blocks import block as any_block
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops import reference
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
