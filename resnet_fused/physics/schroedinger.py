"""The time-dependent Schroedinger equation i psi_t = H psi, H = -1/2 d^2/dx^2 + V(x), in units of hbar = m = 1.

psi = R + i I is a picture of two channels [N, 2, 1, W], so that R_t = H I and I_t = -H R, and the kinetic part of H is
a convolution that mixes them. Two schemes, both of second order in dt and dx and both conserving probability:

    leapfrog         R(t + dt) = R(t) + dt H I(t + dt/2),   I(t + 3dt/2) = I(t + dt/2) - dt H R(t + dt)
                     Visscher 1991 (doi:10.1063/1.168415); two fused blocks a step; dt |H| < 2
    Crank-Nicolson   (1 + i dt H / 2) psi' = (1 - i dt H / 2) psi
                     Goldberg, Schey & Schwartz 1967 (doi:10.1119/1.1973991); an implicit block; any dt

The leapfrog keeps R at whole steps and I half a step later; what it conserves is the sum over x of
R(t)^2 + I(t + dt/2) I(t - dt/2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resnet_fused.flows import Gmres, theta_step
from resnet_fused.flows.branch import Time
from resnet_fused.params import Scale
from resnet_fused.physics.linear import (
    Boundary,
    LinearBranch,
    UnstableStepError,
    check_input,
    padding_mode,
    require_wide,
)
from resnet_fused.physics.stencils import second_difference
from resnet_fused.spec import PaddingMode


class Schroedinger(nn.Module):
    """psi: [N, 2, 1, W], its real and imaginary part, on a grid of spacing dx.

    potential: V at the grid's points [W], real; None: free.
    boundary, dtype, check_stability: as `LinearPDE`. "dirichlet" is a box with walls; "neumann" a mirror.
    """

    def __init__(
        self,
        dx: float,
        potential: Tensor | None = None,
        *,
        boundary: Boundary = "periodic",
        dtype: torch.dtype = torch.float64,
        check_stability: bool = True,
    ) -> None:
        super().__init__()
        mode = padding_mode(boundary)
        require_wide(dtype)
        if not dx > 0:
            raise ValueError(f"dx must be > 0, got {dx!r}")
        self.dx, self.boundary, self.check_stability = dx, boundary, check_stability
        kinetic = -0.5 * second_difference(dx)
        v = None if potential is None else potential.detach().to(dtype).reshape(1, 1, 1, -1)
        self.potential: Tensor | None
        self.register_buffer("potential", v, persistent=False)
        self.real_from_imag = _Field((kinetic, 0 * kinetic), v, (1, 0), mode, dtype)  # (H I, 0)
        self.imag_from_real = _Field((0 * kinetic, -kinetic), v, (0, -1), mode, dtype)  # (0, -H R)
        self.rotation = _Field((kinetic, -kinetic), v, (1, -1), mode, dtype)  # (H I, -H R) = -i H psi

    def step(self, psi: Tensor, dt: float) -> Tensor:
        """(R(t), I(t + dt/2)) -> (R(t + dt), I(t + 3dt/2)). Raises UnstableStepError unless dt |H| < 2."""
        self._check_input(psi)
        if self.check_stability and not dt * self.largest_energy < 2:
            raise UnstableStepError(
                f"dt max|H| = {dt * self.largest_energy:.6g}; the leapfrog is stable below 2: take dt < "
                f"{2 / self.largest_energy:.6g}, a Crank-Nicolson step, or check_stability=False to see it grow"
            )
        return self.imag_from_real.step(self.real_from_imag.step(psi, dt), dt)

    def crank_nicolson_step(self, psi: Tensor, dt: float, tol: float | None = None) -> Tensor:
        """psi at t + dt, both parts of one time, by any dt.

        tol: relative residual of the solution, which bounds what a step may add to the norm; None: 1e-13 in float64,
        1e-6 in float32. Raises flows.ConvergenceError.
        """
        self._check_input(psi)
        tol = {torch.float64: 1e-13, torch.float32: 1e-6}[psi.dtype] if tol is None else tol
        return theta_step(self.rotation, psi, dt, theta=0.5, solver=Gmres(), tol=tol)[0]

    def run(self, psi: Tensor, dt: float, steps: int) -> Tensor:
        """The staggered psi after so many leapfrog steps."""
        for _ in range(steps):
            psi = self.step(psi, dt)
        return psi

    def staggered(self, psi: Tensor, dt: float) -> Tensor:
        """(R, I) of one time as the leapfrog keeps them: I half a step later, to second order in dt."""
        once = self.hamiltonian(psi)
        twice = self.hamiltonian(once)
        imag = psi[:, 1:] - dt / 2 * once[:, :1] - dt**2 / 8 * twice[:, 1:]  # of psi - i dt/2 H psi - dt^2/8 H^2 psi
        return torch.cat([psi[:, :1], imag], 1)

    def hamiltonian(self, psi: Tensor) -> Tensor:
        """H psi, one fused call."""
        self._check_input(psi)
        turned = self.rotation(psi)  # -i H psi
        return torch.cat([-turned[:, 1:], turned[:, :1]], 1)

    def norm(self, psi: Tensor) -> Tensor:
        """[N]: the integral of |psi|^2."""
        return psi.square().sum((1, 2, 3)) * self.dx

    def staggered_norm(self, psi: Tensor, dt: float) -> Tensor:
        """[N]: what the leapfrog conserves of a staggered psi: the integral of R(t)^2 + I(t + dt/2) I(t - dt/2)."""
        before = psi[:, 1:] + dt * self.hamiltonian(psi)[:, :1]
        return (psi[:, :1].square() + psi[:, 1:] * before).sum((1, 2, 3)) * self.dx

    def energy(self, psi: Tensor) -> Tensor:
        """[N]: the integral of conj(psi) H psi, of a psi of one time."""
        return (psi * self.hamiltonian(psi)).sum((1, 2, 3)) * self.dx

    @property
    def largest_energy(self) -> float:
        """A bound of |H|: the kinetic energy is between 0 and 2 / dx^2, the potential what it is."""
        low, high = 0.0, 2 / self.dx**2
        if self.potential is not None:
            low, high = low + float(self.potential.min()), high + float(self.potential.max())
        return max(-low, high)

    def kinetic_energy(self, k: Tensor) -> Tensor:
        """Of a wave of wavenumber k on the grid: (1 - cos k dx) / dx^2, which tends to k^2 / 2."""
        return 2 * torch.sin(k * self.dx / 2) ** 2 / self.dx**2

    def frequency(self, energy: Tensor, dt: float, scheme: str = "leapfrog") -> Tensor:
        """The frequency with which a state of this energy turns under steps of dt.

        leapfrog: sin(w dt / 2) = E dt / 2; "crank_nicolson": tan(w dt / 2) = E dt / 2. Both tend to E.
        """
        angle = {"leapfrog": torch.asin, "crank_nicolson": torch.atan}[scheme](energy * dt / 2)
        return 2 / dt * angle

    def _check_input(self, psi: Tensor) -> None:
        weight = self.rotation.net[0].weight
        assert isinstance(weight, Tensor)
        check_input(psi, weight, "psi")
        width = psi.shape[-1] if self.potential is None else self.potential.shape[-1]
        if psi.dim() != 4 or psi.shape[1:] != (2, 1, width):
            raise ValueError(f"psi must be [N, 2, 1, {width}], its real and imaginary part, got {tuple(psi.shape)}")


class _Field(LinearBranch):
    """(K I, K' R) by a convolution, and the potential's part point by point.

    kinetic: the stencils K, K' [1, 3]. signs: of what V adds to R from I, and to I from R.
    """

    def __init__(
        self,
        kinetic: tuple[Tensor, Tensor],
        potential: Tensor | None,
        signs: tuple[int, int],
        mode: PaddingMode,
        dtype: torch.dtype,
    ) -> None:
        conv = nn.Conv2d(2, 2, (1, 3), padding=(0, 1), bias=False, padding_mode=mode, dtype=dtype)
        weight = torch.zeros(2, 2, 1, 3, dtype=dtype)
        weight[0, 1], weight[1, 0] = kinetic
        conv.weight = nn.Parameter(weight, requires_grad=False)
        super().__init__(conv)
        forces = None if potential is None else potential * torch.tensor(signs, dtype=dtype).reshape(1, 2, 1, 1)
        self.forces: Tensor | None
        self.register_buffer("forces", forces, persistent=False)

    def _call(
        self, x: Tensor, t: Time, steps: bool, scale: Scale, skip_scale: Scale, backend: str | None = None
    ) -> Tensor:
        moved = super()._call(x, t, steps, scale, skip_scale, backend)
        return moved if self.forces is None else moved + (scale * self.forces) * x.flip(1)


def wave_packet(x: Tensor, centre: float, wavenumber: float, width: float) -> Tensor:
    """[1, 2, 1, W]: a Gaussian packet, |psi|^2 of standard deviation `width`, normalised on the grid x [W]."""
    envelope = torch.exp(-((x - centre) ** 2) / (4 * width**2))
    phase = wavenumber * (x - centre)
    psi = torch.stack([envelope * torch.cos(phase), envelope * torch.sin(phase)]).reshape(1, 2, 1, -1)
    return psi / (psi.square().sum() * (x[1] - x[0])).sqrt()


def barrier_transmission(energy: Tensor, height: float, width: float) -> Tensor:
    """The part that passes a square barrier, below its height by tunnelling.

    1 / T = 1 + V^2 sinh^2(q a) / (4 E (V - E)), q = sqrt(2 (V - E)), which above the barrier is an oscillation
    (Landau & Lifshitz, Quantum Mechanics, § 25).
    """
    q = torch.sqrt((2 * (height - energy)).to(torch.complex128))
    ratio = (torch.sinh(q * width) / q) ** 2  # finite where E = V
    return (1 / (1 + height**2 * ratio / (2 * energy))).real


def group_velocity(k: Tensor, dx: float, dt: float) -> Tensor:
    """dw/dk of the leapfrog for a free wave: sin(k dx) / dx / sqrt(1 - (E dt / 2)^2), which tends to k."""
    energy = 2 * torch.sin(k * dx / 2) ** 2 / dx**2
    return torch.sin(k * dx) / dx / torch.sqrt(1 - (energy * dt / 2) ** 2)


def spectrum(psi: Tensor, dx: float) -> tuple[Tensor, Tensor]:
    """(wavenumbers, probabilities) of the Fourier modes of a psi [1, 2, 1, W], in torch.fft's order; they sum to 1."""
    amplitude = torch.fft.fft(torch.complex(psi[0, 0, 0], psi[0, 1, 0]).to(torch.complex128))
    power = amplitude.abs() ** 2
    return 2 * math.pi * torch.fft.fftfreq(psi.shape[-1], dx, dtype=torch.float64), power / power.sum()
