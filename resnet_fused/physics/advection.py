"""The advection-diffusion equation u_t + c u_x = D u_xx in one dimension.

With C = c dt / dx (Courant's number) and r = D dt / dx^2, forward Euler is stable if and only if

    central differences    r <= 1/2  and  C^2 <= 2 r
    upwind differences     |C| + 2 r <= 1

(Hindmarsh, Gresho & Griffiths 1984, doi:10.1002/fld.1650040905).
Central differences of a front wiggle where the cell Peclet number |c| dx / D exceeds 2 (LeVeque 2007, ch. 10; Patankar
1980, ch. 5); upwind ones do not, but add a diffusion of |c| dx / 2.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from resnet_fused.physics import stencils
from resnet_fused.physics.linear import LinearPDE

Scheme = Literal["central", "upwind"]


class AdvectionDiffusion(LinearPDE):
    """A flow of velocity c (m/s) and diffusivity D (m^2/s) on a grid of spacing dx (m).

    Warns for central differences whose cell Peclet number is above 2. Other arguments as `LinearPDE`.
    """

    def __init__(
        self,
        velocity: float,
        diffusivity: float,
        dx: float,
        scheme: Scheme = "central",
        channels: int = 1,
        **settings: Any,
    ) -> None:
        if scheme not in ("central", "upwind"):
            raise ValueError(f"scheme must be 'central' or 'upwind', got {scheme!r}")
        if not diffusivity >= 0 or not dx > 0:
            raise ValueError(f"diffusivity must be >= 0 and dx > 0, got {diffusivity!r}, dx={dx!r}")
        first = stencils.central_difference(dx) if scheme == "central" else stencils.upwind_difference(dx, velocity)
        weights = diffusivity * stencils.second_difference(dx) - velocity * first
        super().__init__(weights, channels, **settings)
        self.velocity, self.diffusivity, self.dx, self.scheme = velocity, diffusivity, dx, scheme
        if self.check_stability and scheme == "central" and self.cell_peclet > 2:
            warnings.warn(
                f"the cell Peclet number |c| dx / D = {self.cell_peclet:.6g} is above 2: central differences wiggle at "
                "fronts; take a smaller dx or scheme='upwind'",
                stacklevel=2,
            )

    @property
    def cell_peclet(self) -> float:
        return abs(self.velocity) * self.dx / self.diffusivity if self.diffusivity > 0 else float("inf")

    @property
    def largest_step(self) -> float:
        """The largest stable explicit dt (s); 0 where there is none."""
        c, d, dx = abs(self.velocity), self.diffusivity, self.dx
        if self.scheme == "upwind":
            return 1 / (c / dx + 2 * d / dx**2)
        return min(dx**2 / (2 * d), 2 * d / c**2 if c > 0 else float("inf")) if d > 0 else 0.0

    def numbers(self, dt: float) -> str:
        if self.conv.weight.requires_grad:
            return super().numbers(dt)
        courant, r = abs(self.velocity) * dt / self.dx, self.diffusivity * dt / self.dx**2
        limits = (
            f"C^2 / (2 r) = {courant**2 / (2 * r) if r > 0 else float('inf'):.6g} <= 1 and r <= 1/2"
            if self.scheme == "central"
            else f"C + 2 r = {courant + 2 * r:.6g} <= 1"
        )
        return (
            f"C = c dt / dx = {courant:.6g}, r = D dt / dx^2 = {r:.6g}, {self.scheme} differences need {limits} "
            f"(dt <= {self.largest_step:.6g})"
        )
