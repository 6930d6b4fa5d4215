"""Whether a step is stable: the spectrum of dt J at x against the method's stability region.

J = dF/dx at x. Its extreme eigenvalues are estimated in the Krylov space that power iteration spans (Arnoldi 1951;
Saad 2011, Numerical Methods for Large Eigenvalue Problems, chapter 6): power iteration alone finds a radius, but not
whether a pair of eigenvalues is complex, on which stability depends. A step is unstable where |R(dt lambda)| > 1 for an
eigenvalue with Re lambda <= 0: the solution of the equation does not grow there and the method's does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from resnet_fused.flows.branch import Branch, Time
from resnet_fused.flows.implicit import NARROW, to_picture, to_rows
from resnet_fused.flows.solvers import Krylov
from resnet_fused.params import Scale

OnUnstable = Literal["raise", "warn"]
# of the estimate of |R|, which has the accuracy of a few Arnoldi steps
SLACK = 1e-3


class StabilityError(RuntimeError):
    """An explicit step is unstable; `stability` has the numbers."""

    def __init__(self, message: str, stability: Stability) -> None:
        super().__init__(message)
        self.stability = stability


class StabilityWarning(UserWarning):
    """As StabilityError, where a warning was asked for."""


class Stability(NamedTuple):
    """radius:     the spectral radius of dt J.
    eigenvalue: of dt J, the one that is amplified most among those with a real part of at most 0; 0 without any.
    growth:     |R(eigenvalue)|, at most 1 in a stable step.
    largest_dt: up to which that eigenvalue's mode is stable; not looked for beyond dt itself.
    """

    radius: float
    eigenvalue: complex
    growth: float
    largest_dt: float

    @property
    def stable(self) -> bool:
        return self.growth <= 1 + SLACK


@torch.no_grad()
def step_stability(
    branch: Branch, x: Tensor, dt: Scale, growth: Sequence[float], t: Time = 0.0, *, dimensions: int = 20, seed: int = 0
) -> Stability:
    """The stability of a step of the method with polynomial `growth` (explicit.METHODS) at x [N, C, H, W].

    dimensions: of the Krylov space, one evaluation of J v each; seed: of its first vector. The worst of all samples.
    """
    like = x.float() if x.dtype in NARROW else x
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(x), x[0].numel(), generator=generator, dtype=torch.float64).to(like)
    space = Krylov(rows, dimensions)

    def product(v: Tensor) -> Tensor:
        return to_rows(branch.jvp(x, to_picture(v, x), t)[1])

    for _ in range(space.most):
        space.extend(product)
    step = float(dt)
    values = torch.linalg.eigvals(space.h[:, : space.size].double().cpu()).flatten() * step
    radius = float(values.abs().max())
    # an exhausted Krylov space leaves zeros
    decaying = values[(values.real <= SLACK * radius) & (values.abs() > 1e-10 * radius)]
    if len(decaying) == 0:
        return Stability(radius, 0j, 1.0, abs(step))
    amplified = _growth(growth, decaying)
    worst = int(amplified.argmax())
    eigenvalue = complex(decaying[worst])
    return Stability(radius, eigenvalue, float(amplified[worst]), abs(step) * _largest(growth, eigenvalue))


def check(branch: Branch, x: Tensor, dt: Scale, method: str, growth: Sequence[float], t: Time, on: OnUnstable) -> None:
    """Raises StabilityError, or warns, with the numbers where a step of `method` at x is unstable."""
    found = step_stability(branch, x, dt, growth, t)
    if found.stable:
        return
    z = found.eigenvalue
    message = (
        f"a step of {method} with dt={float(dt):.4g} is unstable here: the spectral radius of dt * dF/dx is about "
        f"{found.radius:.3g}, and its eigenvalue {z.real:.3g}{z.imag:+.3g}i is amplified {found.growth:.3g} times per "
        f"step although the solution does not grow (accepted: at most 1); dt up to {found.largest_dt:.3g} is stable "
        "there, and method='backward_euler' for every dt"
    )
    if on == "raise":
        raise StabilityError(message, found)
    warnings.warn(message, StabilityWarning, stacklevel=3)


def _growth(coefficients: Sequence[float], z: Tensor) -> Tensor:
    total = torch.zeros_like(z)
    for c in reversed(coefficients):
        total = total * z + c
    return total.abs()


def _largest(coefficients: Sequence[float], z: complex) -> float:
    """The largest share s of z with |R| <= 1 on all of (0, s z]."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        grid = torch.linspace(0, middle, 200, dtype=torch.float64)[1:] * torch.tensor(z, dtype=torch.complex128)
        low, high = (middle, high) if bool((_growth(coefficients, grid) <= 1 + 1e-9).all()) else (low, middle)
    return low
