"""The Schroedinger equation: what is conserved, how waves turn, how packets travel and tunnel."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from resnet_fused.physics import Schroedinger, UnstableStepError, wave_packet
from resnet_fused.physics.schroedinger import barrier_transmission, group_velocity, spectrum


def grid(width: int, dx: float) -> Tensor:
    return torch.arange(width, dtype=torch.float64) * dx


def as_complex(psi: Tensor) -> Tensor:
    return torch.complex(psi[:, 0, 0], psi[:, 1, 0])


def dense(equation: Schroedinger, width: int) -> Tensor:
    """H as a matrix [W, W]: what it makes of each point."""
    points = torch.zeros(width, 2, 1, width, dtype=torch.float64)
    points[:, 0, 0] = torch.eye(width)
    return equation.hamiltonian(points)[:, 0, 0].T


def test_the_hamiltonian_is_the_textbooks_matrix() -> None:
    width, dx = 8, 0.3
    v = torch.linspace(-1, 2, width, dtype=torch.float64)
    eye = torch.eye(width, dtype=torch.float64)
    expected = -0.5 / dx**2 * (eye.roll(1, 0) + eye.roll(-1, 0) - 2 * eye) + torch.diag(v)
    torch.testing.assert_close(dense(Schroedinger(dx, v), width), expected, rtol=1e-14, atol=1e-14)
    walls = expected.clone()
    walls[0, -1] = walls[-1, 0] = 0
    torch.testing.assert_close(dense(Schroedinger(dx, v, boundary="dirichlet"), width), walls, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("with_potential", [False, True])
def test_a_leapfrog_step_is_visschers(with_potential: bool) -> None:
    """Against the same formula with H as a dense matrix, to rounding of one step."""
    width, dx, dt = 9, 0.4, 0.05
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(width, dtype=torch.float64, generator=generator) if with_potential else None
    equation = Schroedinger(dx, v)
    h = dense(equation, width)
    psi = torch.randn(3, 2, 1, width, dtype=torch.float64, generator=generator)
    real = psi[:, 0, 0] + dt * psi[:, 1, 0] @ h.T
    imag = psi[:, 1, 0] - dt * real @ h.T
    torch.testing.assert_close(equation.step(psi, dt)[:, :, 0], torch.stack([real, imag], 1), rtol=0, atol=1e-13)


def test_probability_is_conserved() -> None:
    """Visscher's probability over 2000 steps across a barrier: 1e-10, the issue's bound (rounding would do 1e-12)."""
    width, dx = 256, 0.1
    x = grid(width, dx)
    equation = Schroedinger(dx, 8.0 * ((x > 12) & (x < 12.5)))
    dt = 0.8 * 2 / equation.largest_energy
    psi = equation.staggered(wave_packet(x, 7, 4.0, 1.0), dt)
    before, start = psi.clone(), equation.staggered_norm(psi, dt)
    after = equation.run(psi, dt, 2000)
    assert float(start) == pytest.approx(1, abs=2e-3)  # of the packet half a step on, to second order in dt
    assert float((equation.staggered_norm(after, dt) - start).abs()) < 1e-10
    assert float((after - before).abs().max()) > 0.1  # something has happened


def test_waves_turn_with_the_schemes_frequency() -> None:
    """A plane wave is an eigenvector of a leapfrog step: sin(w dt / 2) = E dt / 2 to 1e-11 after 50 steps; and the
    phase velocity w / k is k / 2 for waves long against dx and dt: within 1 %."""
    width, dx, steps = 64, 0.2, 50
    equation = Schroedinger(dx)
    dt = 0.5 * dx**2
    k = 2 * math.pi / (width * dx) * torch.arange(1, width // 2, dtype=torch.float64)
    w = equation.frequency(equation.kinetic_energy(k), dt)
    phase = k[:, None] * grid(width, dx)

    def at(time: float) -> Tensor:
        return torch.stack([torch.cos(phase - w[:, None] * time), torch.sin(phase - w[:, None] * (time + dt / 2))], 1)[
            :, :, None
        ]

    torch.testing.assert_close(equation.run(at(0), dt, steps), at(steps * dt), rtol=0, atol=1e-11)
    assert float(w[0] / k[0]) == pytest.approx(float(k[0] / 2), rel=0.01)


def test_the_order_is_two_in_dx_and_in_dt() -> None:
    """The frequency of a state against E = k^2 / 2 (dx), and of a leapfrog run against a fine one's (dt)."""
    k = torch.tensor(1.3, dtype=torch.float64)
    energies = [abs(float(Schroedinger(dx).kinetic_energy(k)) - 0.845) for dx in (0.2, 0.1, 0.05)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(energies)] == pytest.approx([2, 2], abs=0.02)
    width, dx, time = 64, 0.4, 0.5
    x = grid(width, dx)
    equation = Schroedinger(dx, 0.5 * (x - 12.8) ** 2)
    h = dense(equation, width)
    energy, states = torch.linalg.eigh(h)
    psi = wave_packet(x, 11, 1.0, 1.5)
    turned = torch.exp(-1j * energy * time) * (states.T.to(torch.complex128) @ as_complex(psi)[0])
    exact = (states.to(torch.complex128) @ turned).real
    errors = []
    for steps in (32, 64, 128):
        dt = time / steps
        after = equation.run(equation.staggered(psi, dt), dt, steps)
        errors.append(float((after[0, 0, 0] - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.1), orders


@pytest.mark.parametrize("potential", [0.0, 3.0, -20.0])
def test_the_stability_limit_from_both_sides(potential: float) -> None:
    """The state of the largest |E|: 1 % below dt |E| = 2 it turns, 1 % above it grows by its factor, the larger root of
    g^2 - (2 - (E dt)^2) g + 1 = 0: 1.33 a step. That is the checkerboard's 2 / dx^2 + V, or a deep well's V."""
    dx, width = 0.5, 16
    equation = Schroedinger(dx, torch.full((width,), potential))
    energy = potential if potential < -1 / dx**2 else 2 / dx**2 + potential
    limit = 2 / abs(energy)
    psi = torch.ones(1, 2, 1, width, dtype=torch.float64)
    psi[:, 1] = 0
    if energy > 0:
        psi[0, 0, 0] = torch.cos(math.pi * torch.arange(width, dtype=torch.float64))
    assert float(equation.run(psi, 0.99 * limit, 500).abs().max()) < 10
    message = f"dt max|H| = 2.02; the leapfrog is stable below 2: take dt < {limit:.6g}"
    with pytest.raises(UnstableStepError, match=re.escape(message)):
        equation.step(psi, 1.01 * limit)
    equation.check_stability = False
    first, second = (float(equation.run(psi, 1.01 * limit, n).abs().max()) for n in (60, 61))
    b = 2.02**2 / 2 - 1
    assert second / first == pytest.approx(b + math.sqrt(b * b - 1), rel=1e-6)


def test_a_packet_travels_with_the_group_velocity() -> None:
    """Its centre against the scheme's dw/dk averaged over its spectrum, to 1e-4: R and I are of times dt/2 apart."""
    width, dx = 512, 0.1
    x = grid(width, dx)
    equation = Schroedinger(dx)
    dt, steps = 0.2 * dx**2, 2000
    psi = wave_packet(x, 15, 3.0, 1.5)
    after = equation.run(equation.staggered(psi, dt), dt, steps)

    def centre(p: Tensor) -> float:
        return float((p.square().sum((0, 1, 2)) * x).sum() / p.square().sum())

    k, probability = spectrum(psi, dx)
    predicted = float((probability * group_velocity(k, dx, dt)).sum())
    measured = (centre(after) - centre(psi)) / (steps * dt)
    assert measured == pytest.approx(predicted, rel=1e-3)
    assert predicted == pytest.approx(3.0, rel=0.03)  # dw/dk = k, but for the grid: sin(k dx) / (k dx) = 0.985


def test_the_energy_of_a_packet() -> None:
    """k^2 / 2 + 1 / (8 s^2), to the grid's 1 %, and it stays, to 1e-3 of it with R and I dt/2 apart."""
    width, dx = 256, 0.1
    x = grid(width, dx)
    equation = Schroedinger(dx)
    psi = wave_packet(x, 12, 2.0, 1.2)
    exact = 2.0 + 1 / (8 * 1.2**2)
    energy = float(equation.energy(psi))
    assert energy == pytest.approx(exact, rel=0.01)
    k, probability = spectrum(psi, dx)
    assert energy == pytest.approx(float((probability * equation.kinetic_energy(k)).sum()), rel=1e-12)
    dt = 0.1 * dx**2
    after = equation.run(equation.staggered(psi, dt), dt, 500)
    assert float(equation.energy(after)) == pytest.approx(energy, rel=1e-3)


def test_the_transmission_of_a_square_barrier() -> None:
    """The closed form at three points known by hand, and as what matching waves at both edges gives."""
    t = barrier_transmission(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 2.0, 1.3)
    q = math.sqrt(2.0)
    by_hand = [
        1 / (1 + 4 * math.sinh(q * 1.3) ** 2 / 4),
        1 / (1 + 4 * 1.3**2 / 4),
        1 / (1 + 4 * math.sin(q * 1.3) ** 2 / 12),
    ]
    assert t.tolist()[0] == pytest.approx(by_hand[0], rel=1e-12)
    assert t.tolist()[2] == pytest.approx(by_hand[2], rel=1e-12)


def test_float32_and_narrower() -> None:
    """1000 steps in float32 conserve probability to 1e-4: a thousand roundings of 6e-8 that mostly cancel."""
    width, dx = 128, 0.2
    equation = Schroedinger(dx, dtype=torch.float32)
    dt = 0.5 * dx**2
    psi = equation.staggered(wave_packet(grid(width, dx), 12, 1.5, 1.0).float(), dt)
    start = equation.staggered_norm(psi, dt)
    assert float((equation.staggered_norm(equation.run(psi, dt, 1000), dt) - start).abs()) < 1e-4
    norm = equation.norm(psi)
    psi = equation.crank_nicolson_step(psi, 2 * dt)
    assert psi.dtype == torch.float32 and float((equation.norm(psi) - norm).abs()) < 1e-5  # 1e-6, and its rounding
    with pytest.raises(TypeError, match=re.escape("dtype is torch.bfloat16; accepted: torch.float64, torch.float32")):
        Schroedinger(dx, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=re.escape("psi is torch.float32, the equation is in torch.float64")):
        Schroedinger(dx).step(psi, dt)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dx must be > 0"):
        Schroedinger(0.0)
    with pytest.raises(ValueError, match="boundary must be one of"):
        Schroedinger(0.1, boundary="open")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=re.escape("psi must be [N, 2, 1, 5], its real and imaginary part, got (1, 2, 1, 6)")
    ):
        Schroedinger(0.1, torch.zeros(5)).step(torch.zeros(1, 2, 1, 6, dtype=torch.float64), 1e-3)


def harmonic(width: int, dx: float) -> tuple[Schroedinger, Tensor]:
    """An oscillator and a displaced packet in it."""
    x = grid(width, dx)
    middle = float(x.mean())
    return Schroedinger(dx, 0.5 * (x - middle) ** 2, boundary="dirichlet"), wave_packet(x, middle - 1.5, 0.5, 0.8)


def test_a_crank_nicolson_step_is_cayleys_form() -> None:
    """(1 + i dt H / 2)^-1 (1 - i dt H / 2) with H as a dense matrix, to 1e-11 in ten steps of residual 1e-13."""
    width, dx, dt = 40, 0.25, 0.1
    equation, psi = harmonic(width, dx)
    h = dense(equation, width).to(torch.complex128)
    eye = torch.eye(width, dtype=torch.complex128)
    cayley = torch.linalg.solve(eye + 0.5j * dt * h, eye - 0.5j * dt * h)
    exact = as_complex(psi)[0]
    for _ in range(10):
        psi, exact = equation.crank_nicolson_step(psi, dt), cayley @ exact
    torch.testing.assert_close(as_complex(psi)[0], exact, rtol=0, atol=1e-11)


def test_crank_nicolson_conserves_norm_and_energy() -> None:
    """100 steps of 3 times the leapfrog's limit: the norm to 1e-10, the issue's bound, and the energy to 1e-9."""
    width, dx = 48, 0.25
    equation, psi = harmonic(width, dx)
    dt = 3 * 2 / equation.largest_energy
    norm, energy = equation.norm(psi), equation.energy(psi)
    for _ in range(100):
        psi = equation.crank_nicolson_step(psi, dt)
    assert float((equation.norm(psi) - norm).abs()) < 1e-10
    assert float((equation.energy(psi) - energy).abs()) < 1e-9


def test_crank_nicolson_turns_waves_with_its_frequency() -> None:
    """tan(w dt / 2) = E dt / 2 for plane waves, to 1e-11 after 10 steps."""
    width, dx, dt, steps = 24, 0.3, 0.2, 10
    equation = Schroedinger(dx)
    k = 2 * math.pi / (width * dx) * torch.arange(1, width // 2, dtype=torch.float64)
    w = equation.frequency(equation.kinetic_energy(k), dt, "crank_nicolson")
    phase = k[:, None] * grid(width, dx)

    def at(time: float) -> Tensor:
        return torch.stack([torch.cos(phase - w[:, None] * time), torch.sin(phase - w[:, None] * time)], 1)[:, :, None]

    psi = at(0)
    for _ in range(steps):
        psi = equation.crank_nicolson_step(psi, dt)
    torch.testing.assert_close(psi, at(steps * dt), rtol=0, atol=1e-11)


def test_crank_nicolson_is_of_second_order() -> None:
    """Against exp(-i H t) of the same H, to 0.1 of an order."""
    width, dx, time = 32, 0.3, 0.4
    equation, start = harmonic(width, dx)
    exact = torch.matrix_exp(-1j * time * dense(equation, width)) @ as_complex(start)[0]
    errors = []
    for steps in (16, 32, 64):
        psi = start
        for _ in range(steps):
            psi = equation.crank_nicolson_step(psi, time / steps)
        errors.append(float((as_complex(psi)[0] - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.1), orders
