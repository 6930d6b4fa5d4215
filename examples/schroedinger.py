"""A quantum wave packet meets a barrier, each time step a residual block: conservation, dispersion, tunnelling, a film.

python examples/schroedinger.py

Writes schroedinger.gif and schroedinger.png to docs/pictures (--out); needs `pip install resnet_fused[pictures]` and
about a minute. Units of hbar = m = 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused.physics import Schroedinger, wave_packet
from resnet_fused.physics.schroedinger import barrier_transmission, group_velocity, spectrum
from resnet_fused.tools.figures import new_figure
from resnet_fused.tools.film import Film
from resnet_fused.tools.tables import table

DX, WAVENUMBER, SPREAD = 0.1, 2.0, 3.0  # of the grid, of the packet
HEIGHT, CELLS = 2.2, 10  # of the barrier, above the packet's energy of 2
INK, WAVE, WALL = "#1d2430", "#1b6a8f", "#c2571a"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=800, help="of the grid, a tenth apart")
    parser.add_argument("--frames", type=int, default=56, help="of the film")
    parser.add_argument("--steps", type=int, default=200, help="Crank-Nicolson steps whose norm is watched")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    numbers, frames = tunnelling(args.points, args.frames)
    numbers |= conservation(args.steps) | orders() | dispersion() | limit()
    numbers["film: bytes"] = film(args.points, frames, args.out / "schroedinger.gif")
    still(args.points, frames, args.out / "schroedinger.png")
    print(f"\nschroedinger.gif ({numbers['film: bytes'] / 1000:.0f} kB) and schroedinger.png are in {args.out}")
    return numbers


def scene(points: int) -> tuple[Tensor, Schroedinger]:
    """The grid, its middle at 0, and a square barrier of CELLS points right of the middle."""
    x = (torch.arange(points, dtype=torch.float64) - points // 2) * DX
    barrier = torch.zeros(points, dtype=torch.float64)
    barrier[points // 2 : points // 2 + CELLS] = HEIGHT
    return x, Schroedinger(DX, barrier)


def tunnelling(points: int, frames: int) -> tuple[dict[str, float], list[tuple[float, Tensor]]]:
    """The packet's passage by leapfrog: what is conserved, how fast it comes, how much of it passes."""
    x, equation = scene(points)
    dt = 0.8 * 2 / equation.largest_energy
    centre = -points * DX / 4
    start = wave_packet(x, centre, WAVENUMBER, SPREAD)
    k, probability = spectrum(start, DX)
    velocity = float((probability * group_velocity(k, DX, dt)).sum())
    steps = round(-2 * centre / velocity / dt)  # until it is as far behind the barrier as it was before
    psi = equation.staggered(start, dt)
    norm = equation.staggered_norm(psi, dt)
    early = round((-centre - 5 * SPREAD) / velocity / dt)  # before it meets the barrier
    travelled = (mean(equation.run(psi, dt, early), x) - mean(psi, x)) / (early * dt)
    shown, done, drift = [(0.0, psi)], 0, 0.0
    for frame in range(1, frames):
        until = round(steps * frame / (frames - 1))
        psi, done = equation.run(psi, dt, until - done), until
        shown.append((done * dt, psi))
        drift = max(drift, float((equation.staggered_norm(psi, dt) - norm).abs()))
    density = psi.square().sum((0, 1, 2)) * DX
    passed = float(density[points // 2 + CELLS :].sum())
    energy = torch.where(k > 0, equation.kinetic_energy(k), 1.0)
    exact = float((probability * (k > 0) * barrier_transmission(energy, HEIGHT, CELLS * DX)).sum())
    rows = [
        ["leapfrog: largest change of the norm", f"{drift:.1e}", "0", ""],
        [
            "group velocity",
            f"{travelled:.6f}",
            f"{velocity:.6f}",
            f"dw/dk of the scheme; {WAVENUMBER} without a grid",
        ],
        ["part that tunnels", f"{passed:.5f}", f"{exact:.5f}", "plane waves, summed over the packet's spectrum"],
        [
            "energy",
            f"{float(equation.energy(start)):.6f}",
            f"{WAVENUMBER**2 / 2 + 1 / (8 * SPREAD**2):.6f}",
            "k²/2 + 1/(8 s²)",
        ],
    ]
    print(table(f"A packet and a barrier, {done} blocks twice", ("", "measured", "theory", ""), rows))
    return {
        "leapfrog: change of the norm": drift,
        "group velocity: relative error": abs(travelled / velocity - 1),
        "tunnelling: relative error": abs(passed / exact - 1),
        "tunnelling: part": passed,
        "energy: relative error": abs(float(equation.energy(start)) / (WAVENUMBER**2 / 2 + 1 / (8 * SPREAD**2)) - 1),
    }, shown


def mean(psi: Tensor, x: Tensor) -> float:
    density = psi.square().sum((0, 1, 2))
    return float((density * x).sum() / density.sum())


def conservation(steps: int) -> dict[str, float]:
    """Crank-Nicolson by the implicit block, at 4 times the leapfrog's largest step."""
    x, equation = scene(240)
    psi = wave_packet(x, -6.0, WAVENUMBER, 1.5)
    dt = 4 * 2 / equation.largest_energy
    norm, energy = float(equation.norm(psi)), float(equation.energy(psi))
    drift = [0.0, 0.0]
    for _ in range(steps):
        psi = equation.crank_nicolson_step(psi, dt)
        now = abs(float(equation.norm(psi)) - norm), abs(float(equation.energy(psi)) - energy)
        drift = [max(a, b) for a, b in zip(drift, now, strict=True)]
    print(
        f"\nCrank-Nicolson, {steps} steps of 4 times the leapfrog's limit: the norm changes by at most {drift[0]:.1e}, "
        f"the energy by {drift[1]:.1e}"
    )
    return {"Crank-Nicolson: change of the norm": drift[0], "Crank-Nicolson: change of the energy": drift[1]}


def orders() -> dict[str, float]:
    """In dt, of a packet in an oscillator against exp(-i H t); in dx, of the energy of a wave."""
    width, dx, time = 64, 0.25, 0.5
    x = (torch.arange(width, dtype=torch.float64) - width / 2) * dx
    equation = Schroedinger(dx, 0.5 * x**2)
    points = torch.zeros(width, 2, 1, width, dtype=torch.float64)
    points[:, 0, 0] = torch.eye(width)
    start = wave_packet(x, -1.5, 0.5, 0.8)
    hamiltonian = equation.hamiltonian(points)[:, 0, 0].T
    exact = torch.matrix_exp(-1j * time * hamiltonian) @ torch.complex(start[0, 0, 0], start[0, 1, 0])

    def leapfrog(steps: int) -> float:
        dt = time / steps
        return float((equation.run(equation.staggered(start, dt), dt, steps)[0, 0, 0] - exact.real).abs().max())

    def crank_nicolson(steps: int) -> float:
        psi = start
        for _ in range(steps):
            psi = equation.crank_nicolson_step(psi, time / steps)
        return float((psi[0, 0, 0] - exact.real).abs().max())

    k = torch.tensor(WAVENUMBER, dtype=torch.float64)
    errors = {
        "dt, leapfrog": [leapfrog(n) for n in (32, 64, 128)],
        "dt, Crank-Nicolson": [crank_nicolson(n) for n in (16, 32, 64)],
        "dx": [abs(float(Schroedinger(d).kinetic_energy(k)) - WAVENUMBER**2 / 2) for d in (0.2, 0.1, 0.05)],
    }
    rows, numbers = [], {}
    for name, each in errors.items():
        slopes = [math.log2(a / b) for a, b in itertools.pairwise(each)]
        rows.append([name, *(f"{e:.3e}" for e in each), *(f"{s:.3f}" for s in slopes)])
        numbers[f"orders: {name}"] = slopes[-1]
    header = ("halved", "error", "halved once", "twice", "order", "order")
    print(table("\nOrders of accuracy", header, rows))
    return numbers


def phase_velocity(number: int, width: int, dt: float, steps: int) -> tuple[float, float, float]:
    """(k, measured from a leapfrog run, the scheme's) of a plane wave with so many periods."""
    equation = Schroedinger(DX)
    k = 2 * math.pi * number / (width * DX)
    w = float(equation.frequency(equation.kinetic_energy(torch.tensor(k, dtype=torch.float64)), dt))
    phase = k * DX * torch.arange(width, dtype=torch.float64)
    psi = torch.stack([torch.cos(phase), torch.sin(phase - w * dt / 2)]).reshape(1, 2, 1, -1)
    after = equation.run(psi, dt, steps)
    # R is a cosine at whole steps: its Fourier coefficient has turned by -w t; the turns before are counted in
    coefficient = torch.fft.fft(after[0, 0, 0])[number]
    turned = -float(torch.angle(coefficient))
    turns = round((w * dt * steps - turned) / (2 * math.pi))
    return k, (turned + 2 * math.pi * turns) / (dt * steps) / k, w / k


def dispersion() -> dict[str, float]:
    """Waves are slower on a grid: the phase velocity of the run, of the scheme, and k / 2."""
    dt, rows, worst = 0.8 * DX**2, [], 0.0
    for number in (1, 4, 8, 16, 24):
        k, measured, scheme = phase_velocity(number, 64, dt, 100)
        worst = max(worst, abs(measured / scheme - 1))
        rows.append(
            [
                f"{k * DX / math.pi:.3f}",
                f"{measured:.9f}",
                f"{scheme:.9f}",
                f"{abs(measured / scheme - 1):.1e}",
                f"{k / 2:.6f}",
            ]
        )
    header = ("k dx / pi", "phase velocity, measured", "of the scheme", "off by", "k / 2")
    print(table("\nDispersion of the leapfrog at dt = 0.8 dx²", header, rows))
    return {"phase velocity: largest relative error": worst}


def limit() -> dict[str, float]:
    """The fastest wave, 1 % below dt |H| = 2 and 1 % above it."""
    equation = Schroedinger(0.5, check_stability=False)
    psi = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    psi[0, 0, 0] = torch.cos(math.pi * torch.arange(16, dtype=torch.float64))
    sizes = {
        side: float(equation.run(psi, side * 2 / equation.largest_energy, 200).abs().max()) for side in (0.99, 1.01)
    }
    print(
        f"\nThe stability limit: after 200 steps the largest |psi| is {sizes[0.99]:.3g} at 0.99 of it, "
        f"{sizes[1.01]:.3g} at 1.01"
    )
    return {"limit: below": sizes[0.99], "limit: above": sizes[1.01]}


def film(points: int, frames: list[tuple[float, Tensor]], path: Path) -> int:
    """|psi|^2 and Re psi over the barrier."""
    x, _ = scene(points)
    made = Film(colours=24)
    for time, psi in frames:
        drawn = new_figure(7.2, 3, dpi=100)
        axes = drawn.subplots()
        draw(axes, x, psi, points)
        density = psi.square().sum((0, 1, 2)) * DX
        sides = float(density[: points // 2].sum()), float(density[points // 2 + CELLS :].sum())
        axes.set_title(f"t = {time:4.1f}    left of the barrier {sides[0]:.3f}, behind it {sides[1]:.3f}", fontsize=10)
        axes.legend(loc="upper left", fontsize=8)
        made.add(drawn)
    return made.save(path, 0.09)


def draw(axes, x: Tensor, psi: Tensor, points: int) -> None:  # type: ignore[no-untyped-def]
    at, density = x.numpy(), psi.square().sum((0, 1, 2)).numpy()
    axes.fill_between(at, density, color=WAVE, alpha=0.35, lw=0)
    axes.plot(at, density, color=WAVE, lw=1.2, label="|ψ|²")
    axes.plot(at, 0.25 * psi[0, 0, 0].numpy(), color=INK, lw=0.6, label="Re ψ / 4")
    edge = float(x[points // 2]) - DX / 2
    axes.axvspan(edge, edge + CELLS * DX, color=WALL, alpha=0.7, lw=0, label=f"V = {HEIGHT}, energy 2")
    axes.set_xlim(float(x[0]), float(x[-1]))
    axes.set_ylim(-0.15, 0.45)
    axes.set_xlabel("x")


def still(points: int, frames: list[tuple[float, Tensor]], path: Path) -> None:
    """Before, at and behind the barrier; the dispersion beside its formula."""
    x, _ = scene(points)
    drawn = new_figure(10, 3, dpi=100)
    *pictures, chart = drawn.subplots(1, 4, width_ratios=[1, 1, 1, 1.3])
    for axes, (time, psi) in zip(pictures, (frames[0], frames[len(frames) // 2], frames[-1]), strict=True):
        draw(axes, x, psi, points)
        axes.set_title(f"t = {time:.1f}", fontsize=10)
        axes.set_yticks([])
    pictures[0].legend(loc="upper right", fontsize=7)
    dt = 0.8 * DX**2
    k = torch.linspace(0.01, math.pi / DX, 200, dtype=torch.float64)
    equation = Schroedinger(DX)
    cells, w = (k * DX / math.pi).numpy(), equation.frequency(equation.kinetic_energy(k), dt)
    chart.plot(cells, (k / 2).numpy(), color=INK, lw=1, ls="--", label="k / 2")
    chart.plot(cells, (w / k).numpy(), color=WAVE, label="the scheme's")
    runs = [phase_velocity(number, 64, dt, 50) for number in range(2, 32, 2)]
    chart.plot([r[0] * DX / math.pi for r in runs], [r[1] for r in runs], "o", ms=4, color=WALL, label="blocks")
    chart.set_xlabel("k dx / π")
    chart.set_title("phase velocity", fontsize=10)
    chart.legend(fontsize=8)
    chart.grid(alpha=0.3)
    drawn.savefig(path)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the grids are too small to share
    main()
