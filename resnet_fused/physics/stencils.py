"""Finite differences as convolution weights, and what they do to a wave: their symbols.

Weights are [R, S] float64 with the centre in the middle, in the order in which ``nn.Conv2d`` reads a picture:

    (L u)[j, i] = sum over r, s of w[r, s] u[j + r - R // 2, i + s - S // 2]

A wave u[j, i] = exp(i (theta_y j + theta_x i)) is an eigenvector of every stencil on a periodic grid, and the symbol is
its eigenvalue (LeVeque 2007, Finite Difference Methods for Ordinary and Partial Differential Equations, ch. 9.6).
"""

from __future__ import annotations

import torch
from torch import Tensor


def second_difference(dx: float) -> Tensor:
    """[1, 3]: u_xx to second order, (u[i+1] - 2 u[i] + u[i-1]) / dx^2."""
    return torch.tensor([[1.0, -2.0, 1.0]], dtype=torch.float64) / dx**2


def central_difference(dx: float) -> Tensor:
    """[1, 3]: u_x to second order, (u[i+1] - u[i-1]) / (2 dx)."""
    return torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64) / (2 * dx)


def upwind_difference(dx: float, velocity: float) -> Tensor:
    """[1, 3]: u_x to first order, from the side that a flow of this velocity comes from."""
    taps = [-1.0, 1.0, 0.0] if velocity >= 0 else [0.0, -1.0, 1.0]
    return torch.tensor([taps], dtype=torch.float64) / dx


def laplacian(dx: float, dims: int) -> Tensor:
    """[1, 3] in one dimension, in two [3, 3]: the five-point stencil of u_xx + u_yy."""
    if dims == 1:
        return second_difference(dx)
    line = torch.zeros(3, 3, dtype=torch.float64)
    line[1] = second_difference(dx)
    return line + line.T


def symbol(weights: Tensor, theta_x: Tensor, theta_y: Tensor | float = 0.0) -> Tensor:
    """The complex factor by which the stencil multiplies a wave of these phases per cell (radians), in their shape."""
    rows, columns = weights.shape
    total = torch.zeros_like(theta_x, dtype=torch.complex128)
    for r in range(rows):
        for s in range(columns):
            phase = (s - columns // 2) * theta_x + (r - rows // 2) * theta_y
            total = total + weights[r, s].double() * torch.exp(1j * phase.double())
    return total


def moments(weights: Tensor, dx: float) -> tuple[Tensor, Tensor, Tensor]:
    """(reaction, drift, diffusion) of a [1, S] stencil: L u = reaction u + drift u_x + diffusion u_xx + ...

    By the Taylor series of u about the centre: the moments of the weights, the second halved.
    """
    offsets = (torch.arange(weights.shape[-1], dtype=weights.dtype) - weights.shape[-1] // 2) * dx
    line = weights.reshape(-1)
    return line.sum(), (line * offsets).sum(), (line * offsets**2).sum() / 2
