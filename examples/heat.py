"""Heat conduction, and a flow that carries it, as chains of residual blocks: how exact, where they blow up, and a film.

python examples/heat.py

Writes heat.gif and heat.png to docs/pictures (--out); needs `pip install resnet_fused[pictures]` and under a minute.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused.physics import AdvectionDiffusion, Heat
from resnet_fused.physics.stencils import moments, symbol
from resnet_fused.tools.figures import new_figure
from resnet_fused.tools.film import Film
from resnet_fused.tools.tables import table

ALPHA, LENGTH = 1.0, 1.0  # m^2/s, m: a bar, or a square plate


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="cells of the film's plate, a side")
    parser.add_argument("--frames", type=int, default=40, help="of the film")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = modes() | limits() | orders() | learned() | flow()
    numbers["film: bytes"] = film(args.size, args.frames, args.out / "heat.gif")
    still(args.size, args.out / "heat.png")
    print(f"\nheat.gif ({numbers['film: bytes'] / 1000:.0f} kB) and heat.png are in {args.out}")
    return numbers


def wave(width: int, number: int) -> Tensor:
    """[1, 1, 1, W]: a cosine of so many periods."""
    return torch.cos(2 * math.pi * number / width * torch.arange(width, dtype=torch.float64)).reshape(1, 1, 1, -1)


def factor(before: Tensor, after: Tensor) -> float:
    """By how much a wave has been multiplied."""
    return float((before * after).sum() / before.square().sum())


def modes(width: int = 64, steps: int = 10) -> dict[str, float]:
    """What one block does to a Fourier mode: the run, the scheme's symbol, the heat equation."""
    dx = LENGTH / width
    bar = Heat(ALPHA, dx)
    dt = 0.8 * bar.largest_step
    rows, worst = [], 0.0
    for number in (1, 4, 8, 32):
        u, k = wave(width, number), 2 * math.pi * number / LENGTH
        measured = factor(u, bar.run(u, dt, steps))
        scheme = (1 - 4 * ALPHA * dt / dx**2 * math.sin(k * dx / 2) ** 2) ** steps
        equation = math.exp(-float(bar.rate(torch.tensor(k, dtype=torch.float64))) * dt * steps)
        worst = max(worst, abs(measured - scheme))
        off = abs(measured - scheme)
        rows.append([str(number), f"{measured:.12f}", f"{scheme:.12f}", f"{off:.1e}", f"{equation:.12f}"])
    header = ("mode", "measured", "symbol of the scheme", "off by", "heat equation")
    print(table(f"A mode after {steps} blocks, alpha dt / dx^2 = 0.4", header, rows))
    return {"modes: largest error": worst}


def limits(steps: int = 200) -> dict[str, float]:
    """The checkerboard's growth a step, 1 % below the stability limit and 1 % above."""
    rows, numbers = [], {}
    for dims in (1, 2):
        plate = Heat(ALPHA, 0.1, dims, check_stability=False)
        sign = torch.cos(math.pi * torch.arange(8, dtype=torch.float64))
        u = (sign if dims == 1 else sign[:, None] * sign).reshape(1, 1, -1, 8)
        for side in (0.99, 1.01):
            grown = float(plate.run(u, side * plate.largest_step, steps).abs().max()) ** (1 / steps)
            theory = abs(1 - 2 * side)
            r = ALPHA * side * plate.largest_step / 0.01
            rows.append(
                [f"{dims}-d", f"{r:.4f}", f"{grown:.9f}", f"{theory:.9f}", "decays" if grown < 1 else "BLOWS UP"]
            )
            numbers[f"limits: {dims}-d at {side:g} of the limit, growth a step"] = grown
    header = ("", "alpha dt / dx^2", "growth a step, measured", "theory", "")
    print(table("\nThe stability limit, 1/2 in one dimension and 1/4 in two, from both sides", header, rows))
    return numbers


def orders() -> dict[str, float]:
    """Orders of accuracy: slopes of the error of a mode."""
    time, k = 0.01, 2 * math.pi / LENGTH

    def in_space(width: int) -> float:
        bar, u = Heat(ALPHA, LENGTH / width), wave(width, 1)
        steps = math.ceil(time / (0.8 * bar.largest_step))
        return abs(factor(u, bar.run(u, time / steps, steps)) - math.exp(-ALPHA * k**2 * time))

    def in_time(steps: int, theta: float) -> float:
        bar, u = Heat(ALPHA, LENGTH / 16), wave(16, 1)
        rate = float(symbol(bar.conv.weight[0, 0], torch.tensor(2 * math.pi / 16, dtype=torch.float64)).real)
        after = u
        for _ in range(steps):
            after = (
                bar.step(after, time / steps) if theta == 0 else bar.implicit_step(after, time / steps, theta, 1e-13)
            )
        return abs(factor(u, after) - math.exp(rate * time))

    errors = {
        "dx, explicit": [in_space(width) for width in (16, 32, 64)],
        "dt, explicit": [in_time(steps, 0.0) for steps in (32, 64, 128)],
        "dt, backward Euler": [in_time(steps, 1.0) for steps in (32, 64, 128)],
        "dt, Crank-Nicolson": [in_time(steps, 0.5) for steps in (4, 8, 16)],
    }
    rows, numbers = [], {}
    for name, each in errors.items():
        slopes = [math.log2(a / b) for a, b in itertools.pairwise(each)]
        rows.append([name, *(f"{e:.3e}" for e in each), *(f"{s:.3f}" for s in slopes)])
        numbers[f"orders: {name}"] = slopes[-1]
    header = ("halved", "error", "halved once", "twice", "order", "order")
    print(table("\nOrders of accuracy", header, rows))
    return numbers


def learned(alpha: float = 0.3, width: int = 32, dt: float = 2e-4) -> dict[str, float]:
    """A stencil of three free weights, trained through the fused block's backward on pairs of exact solutions."""
    dx = LENGTH / width
    generator = torch.Generator().manual_seed(0)
    k = 2 * math.pi * torch.fft.rfftfreq(width, dx, dtype=torch.float64)
    smooth = torch.exp(-((4 * k * dx) ** 2))  # waves that the grid resolves
    waves = torch.randn(16, 1, 1, width // 2 + 1, dtype=torch.complex128, generator=generator) * smooth
    before, after = (torch.fft.irfft(waves * torch.exp(-alpha * k**2 * t), n=width) for t in (0.0, dt))
    bar = Heat(1.0, dx, learnable=True, check_stability=False)
    with torch.no_grad():
        bar.conv.weight.zero_()
    optimizer = torch.optim.LBFGS(bar.parameters(), max_iter=60, tolerance_grad=1e-14, tolerance_change=1e-16)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (bar.step(before, dt) - after).square().sum() / dt**2
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)
    weights = bar.conv.weight.detach()[0, 0]
    found = float(moments(weights, dx)[2])
    scaled = ", ".join(f"{w:.4f}" for w in (weights[0] * dx**2).tolist())
    print(f"\nA learned stencil: dx^2 w = [{scaled}], its diffusion coefficient {found:.5f}; the data's is {alpha}")
    return {"learned: relative error of alpha": abs(found / alpha - 1)}


def flow(width: int = 64, dx: float = 0.05, velocity: float = 1.5, steps: int = 500) -> dict[str, float]:
    """u_t + c u_x = D u_xx: the largest growth of a wave at both sides of the limit, and how far a front overshoots."""
    theta = 2 * math.pi / width * torch.arange(1, width // 2, dtype=torch.float64)
    front = torch.zeros(1, 1, 1, width, dtype=torch.float64)
    front[..., width // 4 : width // 2] = 1
    rows, numbers = [], {}
    for scheme, peclet in (("central", 1.9), ("central", 8.0), ("upwind", 8.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the very number that is shown here
            equation = AdvectionDiffusion(velocity, velocity * dx / peclet, dx, scheme, check_stability=False)
        grown = []
        for side in (0.99, 1.01):
            dt = side * equation.largest_step
            factors = (1 + dt * symbol(equation.conv.weight[0, 0], theta)).abs()
            number = int(factors.argmax()) + 1
            u = wave(width, number)
            amplitudes = [float(torch.fft.fft(v)[0, 0, 0, number].abs()) for v in (u, equation.run(u, dt, steps))]
            grown.append((amplitudes[1] / amplitudes[0]) ** (1 / steps))
            numbers[f"flow: {scheme}, Peclet {peclet:g}, {side:g} of the limit, off by"] = abs(
                grown[-1] - float(factors.max())
            )
            numbers[f"flow: {scheme}, Peclet {peclet:g}, {side:g} of the limit, growth"] = grown[-1]
        u = equation.run(front, 0.5 * equation.largest_step, 40)
        over = max(float(u.max()) - 1, -float(u.min()), 0.0)
        numbers[f"flow: {scheme}, Peclet {peclet:g}, overshoot"] = over
        limit = equation.largest_step
        courant, r = velocity * limit / dx, equation.diffusivity * limit / dx**2
        rows.append(
            [f"{scheme}, {peclet:g}", f"{courant:.4f}", f"{r:.4f}", *(f"{g:.9f}" for g in grown), f"{over:.4f}"]
        )
    header = (
        "scheme, cell Peclet",
        "C at the limit",
        "r at the limit",
        "growth at 0.99",
        "growth at 1.01",
        "overshoot",
    )
    print(
        table(
            "\nAdvection and diffusion: C = c dt/dx, r = D dt/dx²; growth of a wave a step; overshoot of a front",
            header,
            rows,
        )
    )
    return numbers


def start(size: int) -> Tensor:
    """[1, 1, N, N]: a cold plate with a hot ring, bar and spot, whose sharp edges have every wavelength."""
    line = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = line[:, None], line
    radius = ((x - 0.36) ** 2 + (y - 0.42) ** 2).sqrt()
    ring = (radius > 0.17) & (radius < 0.25)
    bar = ((x - 0.78).abs() < 0.05) & ((y - 0.45).abs() < 0.3)
    spot = ((x - 0.36) ** 2 + (y - 0.42) ** 2).sqrt() < 0.05
    return (ring | bar | spot).double()[None, None]


def film(size: int, frames: int, path: Path) -> int:
    """Two plates from the same start, one below the limit of 1/4 and one above it."""
    plate = Heat(ALPHA, LENGTH / size, dims=2, check_stability=False)
    numbers = (0.24, 0.26)
    plates = [start(size)] * 2
    made, steps = Film(colours=48), 0
    times: list[float] = []
    peaks: list[list[float]] = [[], []]
    for frame in range(frames):
        for _ in range(0 if frame == 0 else 1 + frame // 8):  # faster as it slows down
            plates = [plate.step(u, r * plate.dx**2 / ALPHA) for u, r in zip(plates, numbers, strict=True)]
            steps += 1
        times.append(steps)
        for peak, u in zip(peaks, plates, strict=True):
            peak.append(float(u.abs().max()))
        drawn = new_figure(7.2, 2.8, dpi=100)
        left, right, chart = drawn.subplots(1, 3, width_ratios=[1, 1, 1.1])
        for axes, u, r in zip((left, right), plates, numbers, strict=True):
            axes.imshow(u[0, 0].numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(rf"$\alpha\,dt/dx^2 = {r}$", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
        left.set_xlabel("below the limit of 1/4")
        right.set_xlabel("above it")
        for peak, r, colour in zip(peaks, numbers, ("#c2571a", "#5b2a86"), strict=True):
            chart.semilogy(times, peak, color=colour, label=f"{r}")
        chart.set_xlim(0, sum(1 + f // 8 for f in range(1, frames)))
        chart.set_ylim(0.1, 1e4)
        chart.set_xlabel("residual blocks")
        chart.set_title("largest |u|", fontsize=10)
        chart.legend(title=r"$\alpha\,dt/dx^2$", loc="upper left", fontsize=8, title_fontsize=8)
        chart.grid(alpha=0.3)
        made.add(drawn)
    return made.save(path, 0.1)


def still(size: int, path: Path) -> None:
    """The plate at three times, and the decay of modes beside their formula."""
    plate = Heat(ALPHA, LENGTH / size, dims=2)
    dt = 0.96 * plate.largest_step
    u, done = start(size), 0
    drawn = new_figure(10, 2.9, dpi=100)
    *pictures, chart = drawn.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    for axes, steps in zip(pictures, (0, size**2 // 180, size**2 // 30), strict=True):
        u, done = plate.run(u, dt, steps - done), steps
        axes.imshow(u[0, 0].numpy(), cmap="inferno", vmin=0, vmax=1)
        axes.set_title(f"after {steps} blocks", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    width = 64
    bar = Heat(ALPHA, LENGTH / width)
    step = 0.8 * bar.largest_step
    for number, colour in ((1, "#c2571a"), (2, "#1b6a8f"), (4, "#5b2a86")):
        k, at, v = 2 * math.pi * number / LENGTH, [], wave(width, number)
        for _ in range(11):
            at.append(factor(wave(width, number), v))
            v = bar.run(v, step, 20)
        t = 20 * step * 1000 * torch.arange(11).double()
        chart.semilogy(t.numpy(), at, "o", ms=4, color=colour, label=f"mode {number}")
        chart.semilogy(t.numpy(), torch.exp(-ALPHA * k**2 * t / 1000).numpy(), color=colour, lw=1)
    chart.set_ylim(1e-4, 2)
    chart.set_xlabel("time (ms); dots: blocks, lines: heat equation")
    chart.set_title("amplitude of Fourier modes", fontsize=10)
    chart.legend(fontsize=8)
    chart.grid(alpha=0.3)
    drawn.savefig(path)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the grids are too small to share
    main()
