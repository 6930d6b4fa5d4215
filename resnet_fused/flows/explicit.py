"""Explicit one-step methods for x' = F(x, t), written in fused steps of a branch.

    Euler:  x + dt F(x, t)
    Heun:   (x + a + dt F(a, t + dt)) / 2,                            a = x + dt F(x, t)
    RK4:    (-x + a + 2 b + c) / 3 + dt/6 F(c, t + dt),               a = x + dt/2 F(x, t)
                                                                      b = x + dt/2 F(a, t + dt/2)
                                                                      c = x + dt F(b, t + dt/2)

Heun's and the classical Runge-Kutta method of order 4 in their usual form (Hairer, Norsett & Wanner 1993, Solving
Ordinary Differential Equations I, table II.1.2) are sums of the slopes k_i; here the k_i are expressed in the points at
which F is evaluated, so that a and the last term are fused steps and no slope is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused.flows.branch import Branch, Time
from resnet_fused.params import Scale

Step = Callable[[Branch, Tensor, Scale, Time], Tensor]


@dataclass(frozen=True)
class Method:
    """An explicit method.

    step:   (branch, x, dt, t) -> x at t + dt, for x [N, C, H, W].
    order:  the error after a fixed time is O(dt^order).
    calls:  of the fused block, per step.
    growth: coefficients of the stability polynomial R, x_{k+1} = R(dt lambda) x_k on x' = lambda x, ascending.
    """

    step: Step
    order: int
    calls: int
    growth: tuple[float, ...]


def _euler(branch: Branch, x: Tensor, dt: Scale, t: Time) -> Tensor:
    return branch.step(x, dt, t)


def _heun(branch: Branch, x: Tensor, dt: Scale, t: Time) -> Tensor:
    a = branch.step(x, dt, t)
    return branch.step(a, dt / 2, t + dt, skip_scale=0.5).add(x, alpha=0.5)


def _rk4(branch: Branch, x: Tensor, dt: Scale, t: Time) -> Tensor:
    a = branch.step(x, dt / 2, t)
    b = x + branch(a, t + dt / 2, scale=dt / 2)
    c = x + branch(b, t + dt / 2, scale=dt)
    rest = torch.add(a - x, b, alpha=2)
    return branch.step(c, dt / 6, t + dt, skip_scale=1 / 3).add(rest, alpha=1 / 3)


METHODS = {
    "euler": Method(_euler, 1, 1, (1.0, 1.0)),
    "heun": Method(_heun, 2, 2, (1.0, 1.0, 1 / 2)),
    "rk4": Method(_rk4, 4, 4, (1.0, 1.0, 1 / 2, 1 / 6, 1 / 24)),
}
