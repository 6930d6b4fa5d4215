"""u_t = L u with a stencil L of constant coefficients: time steps as residual blocks.

    explicit (forward Euler)   u + dt L u                               one fused block: skip "identity", dt its scale
    implicit (theta scheme)    (1 - theta dt L) u' = (1 + (1 - theta) dt L) u

The block's convolution holds the stencil and its padding mode the boundary. That a residual block is a step of forward
Euler is E 2017 (doi:10.1007/s40304-017-0103-z); that its convolution may be a differential operator, Ruthotto & Haber
2018 (arXiv:1804.04272).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from resnet_fused.flows import Branch, Gmres, theta_step
from resnet_fused.flows.branch import Time
from resnet_fused.physics.stencils import symbol
from resnet_fused.spec import PaddingMode

Boundary = Literal["periodic", "dirichlet", "neumann"]

# A cell beyond the edge holds: what is on the other side; 0; the edge's own value, so that nothing flows through it.
PADDING: dict[Boundary, PaddingMode] = {"periodic": "circular", "dirichlet": "zeros", "neumann": "replicate"}
DTYPES = (torch.float64, torch.float32)
PHASES = {1: 4096, 2: 128}  # per axis, over half a turn: where the amplification is looked at
ROUNDING = 1e-12  # of an amplification in float64; a step at the very limit has 1


class UnstableStepError(ValueError):
    """A time step by which some wave grows without bound."""


def padding_mode(boundary: Boundary) -> PaddingMode:
    """The convolution's padding mode for a boundary; raises ValueError for another name."""
    if boundary not in PADDING:
        raise ValueError(f"boundary must be one of {', '.join(map(repr, PADDING))}, got {boundary!r}")
    return PADDING[boundary]


def require_wide(dtype: torch.dtype) -> None:
    """Raises TypeError for 16 bits, of which a time step is too small a part."""
    if dtype not in DTYPES:
        raise TypeError(
            f"dtype is {dtype}; accepted: {', '.join(map(str, DTYPES))}: narrower ones lose a small step in u"
        )


def check_input(u: Tensor, weight: Tensor, name: str) -> None:
    """Raises TypeError where u is not of the equation's dtype, or that has become one of 16 bits."""
    require_wide(weight.dtype)
    if u.dtype != weight.dtype:
        raise TypeError(f"{name} is {u.dtype}, the equation is in {weight.dtype}: convert one of them")


class LinearBranch(Branch):
    """A branch that is linear in x: its derivative is itself, so the products of an implicit step are fused calls."""

    def jvp(self, x: Tensor, v: Tensor, t: Time = 0.0) -> tuple[Tensor, Tensor]:
        return self(x, t), self(v, t)


class LinearPDE(nn.Module):
    """u_t = L u on a grid, u: [N, C, 1, W] in one dimension and [N, C, H, W] in two; the channels do not mix.

    weights:   L's stencil [R, S], odd sizes; see `stencils`. It becomes ``conv.weight`` [C, 1, R, S].
    boundary:  "periodic", "dirichlet" (0 in the cell beyond the edge) or "neumann" (no flux through the edge).
    learnable: the stencil is trained; every channel then has its own.
    dtype:     float64 or float32. Narrower ones are refused: dt L u is a small part of u, and 8 bits lose it.
    check_stability: raise `UnstableStepError` for a step under which a wave grows: von Neumann's criterion (LeVeque
               2007, ch. 9.6), exact for periodic boundaries.
    """

    def __init__(
        self,
        weights: Tensor,
        channels: int = 1,
        *,
        boundary: Boundary = "periodic",
        learnable: bool = False,
        dtype: torch.dtype = torch.float64,
        check_stability: bool = True,
    ) -> None:
        super().__init__()
        mode = padding_mode(boundary)
        require_wide(dtype)
        rows, columns = weights.shape
        if not (rows % 2 and columns % 2):
            raise ValueError(f"a stencil has a centre: odd sizes, got {rows}x{columns}")
        self.dims = 1 if rows == 1 else 2
        self.check_stability = check_stability
        conv = nn.Conv2d(
            channels,
            channels,
            (rows, columns),
            padding=(rows // 2, columns // 2),
            groups=channels,
            bias=False,
            padding_mode=mode,
            dtype=dtype,
        )
        conv.weight = nn.Parameter(weights.to(dtype).repeat(channels, 1, 1, 1), requires_grad=learnable)
        self.branch = LinearBranch(conv)
        self._checked: tuple[float, float, int] | None = None

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution that holds the stencil."""
        return self.branch.net[0]  # type: ignore[return-value]

    def forward(self, u: Tensor) -> Tensor:
        """L u, one fused call."""
        self._check_input(u)
        return self.branch(u)

    def step(self, u: Tensor, dt: float) -> Tensor:
        """u + dt L u, one fused call.

        Raises UnstableStepError with the numbers, TypeError where u is of another dtype than the equation.
        """
        self._check_input(u)
        if self.check_stability:
            self._require_stable(dt, 0.0)
        return self.branch.step(u, dt)

    def run(self, u: Tensor, dt: float, steps: int) -> Tensor:
        """u after so many explicit steps."""
        for _ in range(steps):
            u = self.step(u, dt)
        return u

    def implicit_step(self, u: Tensor, dt: float, theta: float = 1.0, tol: float | None = None) -> Tensor:
        """u' of (1 - theta dt L) u' = (1 + (1 - theta) dt L) u; theta 1: backward Euler, 1/2: Crank-Nicolson.

        Solved by GMRES (`flows.theta_step`), whose products with L are fused calls, to a relative residual of tol: None
        takes 1e-10 in float64, 1e-5 in float32. From theta = 1/2 on no dt is unstable.

        Raises UnstableStepError below, TypeError, flows.ConvergenceError.
        """
        self._check_input(u)
        if self.check_stability and theta < 0.5:
            self._require_stable(dt, theta)
        return theta_step(self.branch, u, dt, theta=theta, solver=Gmres(), tol=tol)[0]

    def symbols(self) -> Tensor:
        """L's eigenvalue for waves over half a turn of phases per cell in x and a whole one in y: complex [..]; 1/s."""
        count = PHASES[self.dims]
        theta = torch.linspace(0, torch.pi, count + 1, dtype=torch.float64)
        stencils = self.conv.weight.detach().double().cpu().flatten(0, 1)
        if self.dims == 1:
            return torch.stack([symbol(w, theta) for w in stencils])
        theta_x, theta_y = torch.meshgrid(theta, torch.cat([-theta[1:].flip(0), theta]), indexing="ij")
        return torch.stack([symbol(w, theta_x, theta_y) for w in stencils])

    def amplification(self, dt: float, theta: float = 0.0) -> float:
        """The largest factor by which one step multiplies a wave: |1 + (1 - theta) dt l| / |1 - theta dt l|."""
        grown = dt * self.symbols()
        return float(((1 + (1 - theta) * grown) / (1 - theta * grown)).abs().max())

    def numbers(self, dt: float) -> str:
        """The scheme's dimensionless numbers and their limits, for messages."""
        return f"dt max|L| = {dt * float(self.symbols().abs().max()):.6g}"

    def _check_input(self, u: Tensor) -> None:
        check_input(u, self.conv.weight, "u")
        if u.dim() == 4 and self.dims == 1 and u.shape[2] != 1:
            raise ValueError(f"in one dimension u is [N, C, 1, W], got {tuple(u.shape)}")

    def _require_stable(self, dt: float, theta: float) -> None:
        known = (dt, theta, self.conv.weight._version)
        if known == self._checked:
            return
        largest = self.amplification(dt, theta)
        if not largest <= 1 + ROUNDING:  # NaN is unstable, too
            raise UnstableStepError(
                f"a step of dt = {dt:.6g} multiplies some wave by {largest:.6g} each time: {self.numbers(dt)}. Take a "
                "smaller dt or an implicit step, or check_stability=False to see it grow"
            )
        self._checked = known
