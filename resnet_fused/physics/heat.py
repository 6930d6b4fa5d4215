"""The heat equation u_t = alpha (u_xx + u_yy).

Forward Euler with central differences is of first order in dt and second in dx; it is stable if and only if
alpha dt / dx^2 <= 1 / (2 dims) (Courant, Friedrichs & Lewy 1928; LeVeque 2007, ch. 9.3 and 9.7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.physics import stencils
from resnet_fused.physics.linear import LinearPDE


class Heat(LinearPDE):
    """Heat conduction on a grid of spacing dx (m) with diffusivity alpha (m^2/s), in one or two dimensions.

    Other arguments as `LinearPDE`.
    """

    def __init__(self, alpha: float, dx: float, dims: int = 1, channels: int = 1, **settings: Any) -> None:
        if dims not in (1, 2):
            raise ValueError(f"dims must be 1 or 2, got {dims!r}")
        if not alpha >= 0 or not dx > 0:
            raise ValueError(f"alpha must be >= 0 and dx > 0, got alpha={alpha!r}, dx={dx!r}")
        super().__init__(alpha * stencils.laplacian(dx, dims), channels, **settings)
        self.alpha, self.dx = alpha, dx

    @property
    def largest_step(self) -> float:
        """The largest stable explicit dt (s)."""
        return self.dx**2 / (2 * self.dims * self.alpha)

    def numbers(self, dt: float) -> str:
        if self.conv.weight.requires_grad:
            return super().numbers(dt)
        number = self.alpha * dt / self.dx**2
        return (
            f"alpha dt / dx^2 = {number:.6g}, the limit is 1/{2 * self.dims} = {1 / (2 * self.dims):.6g} "
            f"(dt <= {self.largest_step:.6g})"
        )

    def rate(self, kx: Tensor, ky: Tensor | float = 0.0) -> Tensor:
        """The PDE's own decay rate alpha k^2 (1/s) of a wave of wavenumbers kx, ky (1/m)."""
        return self.alpha * (kx**2 + torch.as_tensor(ky) ** 2)
