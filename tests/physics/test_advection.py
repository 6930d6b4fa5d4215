"""Advection and diffusion: the scheme's symbol, its limits from both sides, its order, and its dispersion."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from resnet_fused.physics import AdvectionDiffusion, UnstableStepError
from resnet_fused.physics.stencils import moments, symbol

C, D, LENGTH = 1.5, 0.2, 2.0


def waves(width: int, numbers: Tensor) -> Tensor:
    """exp(i theta j) of each wave number, cosine and sine as two pictures: [2 K, 1, 1, W]."""
    phase = 2 * math.pi / width * numbers[:, None].double() * torch.arange(width, dtype=torch.float64)
    return torch.cat([torch.cos(phase), torch.sin(phase)]).reshape(-1, 1, 1, width)


def factors(before: Tensor, after: Tensor) -> Tensor:
    """[K]: the complex factor by which each wave has been multiplied."""
    z, w = (torch.complex(*t.chunk(2)) for t in (before, after))
    return ((z.conj() * w).sum((1, 2, 3)) / (z.conj() * z).sum((1, 2, 3))).flatten()


@pytest.mark.parametrize(("velocity", "scheme"), [(C, "central"), (C, "upwind"), (-C, "upwind")])
def test_the_symbol(velocity: float, scheme: str) -> None:
    """Every wave's factor in closed form, to 1e-12 after 10 steps."""
    width, dx = 24, LENGTH / 24
    equation = AdvectionDiffusion(velocity, D, dx, scheme)  # type: ignore[arg-type]
    dt = 0.9 * equation.largest_step
    numbers = torch.arange(width // 2)
    theta, u = 2 * math.pi / width * numbers.double(), waves(width, numbers)
    courant, r = velocity * dt / dx, D * dt / dx**2
    added = 0 if scheme == "central" else abs(courant) / 2  # upwind is central with a diffusion of |c| dx / 2
    exact = torch.complex(1 - 2 * (r + added) * (1 - torch.cos(theta)), -courant * torch.sin(theta))
    torch.testing.assert_close(factors(u, equation.run(u, dt, 10)), exact**10, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["central", "upwind"])
@pytest.mark.parametrize("diffusivity", [0.01, 0.05, 0.5])
def test_the_limit_from_both_sides(scheme: str, diffusivity: float) -> None:
    """The closed form of the largest step is von Neumann's: 1 % below it every wave decays, 1 % above some grows.

    The wave that grows fastest, or decays slowest, is followed for 500 steps; its size is its factor's power, to a
    relative 1e-9.
    """
    dx, width = 0.05, 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cell Peclet number above 2
        equation = AdvectionDiffusion(C, diffusivity, dx, scheme)  # type: ignore[arg-type]
    numbers = torch.arange(1, width // 2)
    for side in (0.99, 1.01):
        dt = side * equation.largest_step
        size = (1 + dt * symbol(equation.conv.weight[0, 0], 2 * math.pi / width * numbers.double())).abs()
        u = waves(width, numbers[size.argmax()].reshape(1))
        assert (equation.amplification(dt) <= 1 + 1e-12) == (float(size.max()) < 1) == (side < 1)
        if side > 1:
            with pytest.raises(UnstableStepError, match=rf"C = c dt / dx = .* {scheme} differences need .* \(dt <= "):
                equation.step(u, dt)
            equation.check_stability = False
        grown = factors(u, equation.run(u, dt, 500)).abs()
        assert float(grown[0]) == pytest.approx(float(size.max()) ** 500, rel=1e-9)
        assert (float(grown[0]) < 1) == (side < 1)


def test_central_differences_without_diffusion_are_never_stable() -> None:
    equation = AdvectionDiffusion(C, 0.0, 0.1, "central", check_stability=False)
    assert equation.largest_step == 0 and equation.amplification(1e-3) > 1
    assert AdvectionDiffusion(C, 0.0, 0.1, "upwind").largest_step == pytest.approx(0.1 / C)


@pytest.mark.parametrize(("scheme", "order"), [("central", 2), ("upwind", 1)])
def test_the_order_in_dx(scheme: str, order: int) -> None:
    """Phase and size of a wave against exp((-i c k - D k^2) t), dt as dx^2 so that dx decides; to 0.1 of an order."""
    errors = []
    k, time = 2 * math.pi / LENGTH, 0.2
    for width in (32, 64, 128):
        dx = LENGTH / width
        equation = AdvectionDiffusion(C, D, dx, scheme)  # type: ignore[arg-type]
        steps = math.ceil(time / (0.1 * dx**2 / D))
        u = waves(width, torch.tensor([1]))
        exact = complex(math.exp(-D * k**2 * time)) * complex(math.cos(C * k * time), -math.sin(C * k * time))
        errors.append(abs(complex(factors(u, equation.run(u, time / steps, steps))[0]) - exact))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.1), orders


def test_waves_travel_at_the_schemes_phase_velocity() -> None:
    """-angle(g) / (k dt) of the run against atan2 of the symbol, to 1e-12, and within 1 % of c for long waves."""
    width, dx = 128, LENGTH / 128
    equation = AdvectionDiffusion(C, D, dx)
    dt = 0.5 * equation.largest_step
    numbers = torch.arange(1, 20)
    k = 2 * math.pi / LENGTH * numbers.double()
    u = waves(width, numbers)
    measured = -torch.angle(factors(u, equation.step(u, dt))) / (k * dt)
    g = 1 + dt * symbol(equation.conv.weight[0, 0], k * dx)
    torch.testing.assert_close(measured, -torch.angle(g) / (k * dt), rtol=1e-12, atol=0)
    assert float(measured[0]) == pytest.approx(C, rel=0.01)


def test_the_cell_peclet_number_decides_whether_fronts_wiggle() -> None:
    """Of a step from 0 to 1: below 2 nothing leaves [0, 1] (every factor of the update is >= 0; 1e-12 is rounding),
    above 2 central differences do and upwind ones do not."""
    front = torch.zeros(1, 1, 1, 64, dtype=torch.float64)
    front[..., 16:32] = 1
    overshoots = {}
    for peclet, scheme in ((1.9, "central"), (8.0, "central"), (8.0, "upwind")):
        dx = 0.05
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            equation = AdvectionDiffusion(C, C * dx / peclet, dx, scheme)  # type: ignore[arg-type]
        assert equation.cell_peclet == pytest.approx(peclet)
        messages = [str(w.message) for w in caught]
        assert ([m for m in messages if "above 2" in m] != []) == (peclet > 2 and scheme == "central"), messages
        u = equation.run(front, 0.5 * equation.largest_step, 40)
        overshoots[peclet, scheme] = max(float(u.max()) - 1, -float(u.min()))
    assert overshoots[1.9, "central"] <= 1e-12 and overshoots[8.0, "upwind"] <= 1e-12
    assert overshoots[8.0, "central"] > 0.05


def test_what_flows_is_conserved() -> None:
    """The weights sum to 0, so the total of a periodic grid stays, to rounding of 200 steps."""
    equation = AdvectionDiffusion(C, D, 0.1)
    u = torch.rand(2, 1, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = equation.run(u, equation.largest_step, 200)
    torch.testing.assert_close(after.sum(-1), u.sum(-1), rtol=1e-13, atol=0)


def test_a_stencil_tells_its_coefficients() -> None:
    equation = AdvectionDiffusion(C, D, 0.1)
    reaction, drift, diffusion = moments(equation.conv.weight[0, 0], 0.1)
    assert float(reaction) == pytest.approx(0, abs=1e-12)
    assert (float(drift), float(diffusion)) == pytest.approx((-C, D), rel=1e-12)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="scheme must be 'central' or 'upwind'"):
        AdvectionDiffusion(C, D, 0.1, "downwind")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="diffusivity must be >= 0"):
        AdvectionDiffusion(C, -D, 0.1)


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_implicit_steps(theta: float) -> None:
    """(1 + (1 - theta) dt l) / (1 - theta dt l) of every wave, at 10 times the explicit limit; to 1e-9, the residual of
    1e-12 times the condition of 1 - theta dt L, below 50."""
    width = 16
    equation = AdvectionDiffusion(C, D, 0.1)
    dt = 10 * equation.largest_step
    numbers = torch.arange(width // 2)
    grown = dt * symbol(equation.conv.weight[0, 0], 2 * math.pi / width * numbers.double())
    u = waves(width, numbers)
    exact = (1 + (1 - theta) * grown) / (1 - theta * grown)
    torch.testing.assert_close(factors(u, equation.implicit_step(u, dt, theta, tol=1e-12)), exact, rtol=0, atol=1e-9)
    assert equation.amplification(dt, theta) <= 1 + 1e-12
