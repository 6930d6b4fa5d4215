"""Adaptive step sizes and the adjoint method, by torchdiffeq on the same fused F."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.flows.branch import Branch, Time
from resnet_fused.flows.implicit import NARROW

METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


class _Field(nn.Module):
    """F(t, x), torchdiffeq's order of arguments."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.branch(x, t)


def integrate(
    branch: Branch,
    x: Tensor,
    t0: Time,
    t1: Time,
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-7,
    adjoint: bool = False,
) -> Tensor:
    """x at t1 of x' = F(x, t), x(t0) = x; the error per step is held below atol + rtol |x|.

    x: [N, C, H, W], float32 or float64: in 16 bits F's rounding is larger than any error that a step is held to. The
       step size is one for the batch: it depends on every sample.
    method: of torchdiffeq, one of `METHODS`; "dopri5" is Dormand & Prince 1980.
    adjoint: gradients by integrating backwards in time instead of through the steps, so memory does not depend on their
       number (Chen et al. 2018, arXiv:1806.07366); uses first derivatives of F only, as the fused operators have them.

    Raises ImportError without torchdiffeq; TypeError for 16 bits; ValueError for another method, an F that changes the
    shape of x, or, with adjoint, a norm with batch statistics.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; accepted: {', '.join(map(repr, METHODS))}")
    if x.dtype in NARROW:
        raise TypeError(f"x is {x.dtype}; an adaptive method takes float32 or float64, fixed steps take 16 bits too")
    if adjoint:
        branch.require_fixed_norms("the adjoint method")
    torchdiffeq = _torchdiffeq()
    times = torch.stack([torch.as_tensor(t, dtype=x.dtype, device=x.device) for t in (t0, t1)])
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    return solve(_Field(branch), x, times, method=method, rtol=rtol, atol=atol)[-1]


def _torchdiffeq() -> Any:
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            "adaptive step sizes and the adjoint method need torchdiffeq: `pip install torchdiffeq`; the fixed steps "
            f"euler, heun, rk4, backward_euler and crank_nicolson do not (import said: {error})"
        ) from error
    return torchdiffeq
