"""What docs/theory says of flows in numbers, measured:

python -m resnet_fused.flows.measure [orders] [stiff] [memory] [calls] [--pictures FOLDER]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.flows import explicit
from resnet_fused.flows.branch import Branch
from resnet_fused.flows.flow import Flow
from resnet_fused.flows.implicit import solve, theta_step
from resnet_fused.flows.solvers import ConvergenceWarning, FixedPoint
from resnet_fused.flows.stability import step_stability
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED = (*explicit.METHODS, "backward_euler", "crank_nicolson")


# --- order of convergence ---------------------------------------------------------------------------------------------


def linear_branch(matrix: Tensor) -> Branch:
    """F(x) = A x in every pixel, A [C, C]: a 1x1 convolution."""
    conv = nn.Conv2d(len(matrix), len(matrix), 1, bias=False).to(matrix.dtype)
    with torch.no_grad():
        conv.weight.copy_(matrix[:, :, None, None])
    return Branch(conv)


def swirl(dtype: torch.dtype = torch.float64) -> Tensor:
    """A [4, 4] with two decaying rotations: eigenvalues -0.3 +- 2i and -0.5 +- 0.7i, in mixed coordinates."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    for i, (decay, turn) in enumerate(((-0.3, 2.0), (-0.5, 0.7))):
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[decay, -turn], [turn, decay]])
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    return (basis @ matrix @ basis.T).to(dtype)


@torch.no_grad()
def errors(method: str, steps: Sequence[int], total: float = 1.0) -> list[float]:
    """Relative error at time `total` of x' = A x, A = swirl(), against expm(A t) x; float64."""
    matrix = swirl()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = torch.einsum("ij,njhw->nihw", torch.linalg.matrix_exp(total * matrix), x)
    options: dict[str, Any] = {} if method in explicit.METHODS else {"tol": 1e-13}
    found = []
    for count in steps:
        flow = Flow(linear_branch(matrix), count, T=total, method=method, **options)
        found.append(float((flow(x) - exact).norm() / exact.norm()))
    return found


def orders(pictures: Path | None) -> None:
    steps = (4, 8, 16, 32, 64)
    found = {method: errors(method, steps) for method in FIXED}
    rows = []
    for method, values in found.items():
        slopes = [math.log2(a / b) for a, b in pairwise(values)]
        rows.append([method, *(f"{e:.2e}" for e in values), f"{slopes[-1]:.3f}"])
    header = ("method", *(f"dt=1/{n}" for n in steps), "order")
    print(table("Relative error at t = 1 of x' = A x, against the matrix exponential (float64)", header, rows))
    if pictures is not None:
        figure = new_figure(6.4, 4.2)
        axes = figure.subplots()
        sizes = [1 / n for n in steps]
        for method, marker in zip(explicit.METHODS, "os^", strict=True):
            order, values = explicit.METHODS[method].order, found[method]
            axes.loglog(sizes, values, marker=marker, label=f"{method}, order {order}")
            axes.loglog(sizes, [values[-1] * (s / sizes[-1]) ** order for s in sizes], color="grey", lw=0.8, ls="--")
        axes.set(xlabel="step size dt", ylabel="relative error at t = 1", title="Fused steps against expm(A t) x")
        axes.set_xticks(sizes, [f"1/{n}" for n in steps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.plot([], [], color="grey", lw=0.8, ls="--", label="dt^order")
        axes.legend(loc="lower right")
        _draw(figure, pictures / "flow_orders.png")


# --- a stiff equation -------------------------------------------------------------------------------------------------


def heat_branch(diffusivity: float, dtype: torch.dtype = torch.float64) -> Branch:
    """F(x) = diffusivity * the five-point Laplacian, zeros beyond the border; eigenvalues down to -8 * diffusivity."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).to(dtype)
    stencil = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(diffusivity * stencil)
    return Branch(conv)


class Decay(NamedTuple):
    """|x| / |x_0| after each step, by method; radius: the spectral radius of dt J as it was estimated."""

    sizes: dict[str, list[float]]
    radius: float
    iterations: int


@torch.no_grad()
def decay(dt: float = 0.01, diffusivity: float = 100.0, steps: int = 10, size: int = 16) -> Decay:
    """The heat equation from noise: its solution decays, explicit steps amplify what is rough, implicit ones don't."""
    x0 = torch.randn(1, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    branch = heat_branch(diffusivity)
    sizes = {}
    for method in ("euler", "rk4", "crank_nicolson", "backward_euler"):
        flow = Flow(branch, steps, dt=dt, method=method)
        sizes[method] = [1.0, *(float(x.norm() / x0.norm()) for x in flow.states(x0))]
    _, report = theta_step(branch, x0, dt)
    sizes["exact"] = [float(x.norm() / x0.norm()) for x in _heat_exact(x0, diffusivity, dt, steps)]
    radius = step_stability(branch, x0, dt, explicit.METHODS["euler"].growth).radius
    return Decay(sizes, radius, int(report.iterations.max()))


def _heat_exact(x0: Tensor, diffusivity: float, dt: float, steps: int) -> list[Tensor]:
    """expm(t (L x I + I x L)) x0 = E x0 E, E = expm(t L), L the one-dimensional stencil."""
    size = x0.shape[-1]
    ones = torch.ones(size - 1, dtype=x0.dtype)
    line = torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(size, dtype=x0.dtype)
    each = [torch.linalg.matrix_exp(k * dt * diffusivity * line) for k in range(steps + 1)]
    return [e @ x0 @ e for e in each]


def stiff(pictures: Path | None) -> None:
    found = decay()
    rows = [[name, f"{sizes[1]:.3e}", f"{sizes[-1]:.3e}"] for name, sizes in found.sizes.items()]
    print(
        table(
            f"The heat equation from noise, dt * radius = {found.radius:.2f}: |x| / |x_0| "
            f"(backward Euler: {found.iterations} Newton iterations per step)",
            ("method", "after 1 step", "after 10 steps"),
            rows,
        )
    )
    if pictures is not None:
        figure = new_figure(6.4, 4.2)
        axes = figure.subplots()
        styles = {"euler": "o-", "rk4": "^-", "crank_nicolson": "s-", "backward_euler": "D-", "exact": "k--"}
        for name, sizes in found.sizes.items():
            axes.semilogy(
                sizes, styles[name], label=name.replace("_", " ").replace("crank nic", "Crank-Nic"), markersize=4
            )
        axes.set(
            xlabel="step",
            ylabel="|x| / |x at the start|",
            title=f"A stiff equation: heat from noise, dt x spectral radius = {found.radius:.1f}",
        )
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        _draw(figure, pictures / "implicit_stiff.png")


# --- memory against iterations ----------------------------------------------------------------------------------------


def contractive_branch(
    channels: int = 8, seed: int = 0, gain: float = 0.5, dtype: torch.dtype = torch.float32
) -> Branch:
    """conv, SiLU, conv without norms, weights drawn small enough for z = u + F(z) to have a solution."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
    )
    with torch.no_grad():
        for conv in (net[0], net[2]):
            nn.init.normal_(conv.weight, std=gain / (9 * channels) ** 0.5)  # type: ignore[arg-type]
    return Branch.of(net.to(dtype))


class Saved(NamedTuple):
    """What autograd saves: bytes, the same in units of the block's input, and how many of its size are among it."""

    total: int
    units: float
    inputs: int


def saved(fn: Callable[[], Any], x: Tensor) -> Saved:
    """Distinct storages that autograd saves while fn runs; those of x's size and layout count as block inputs.

    Every tensor counts that is no nn.Parameter, the leaf at which an implicit block is recorded too.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if not isinstance(t, nn.Parameter)
    }
    unit = x.untyped_storage().nbytes()
    total = sum(sizes.values())
    return Saved(total, total / unit, sum(size == unit for size in sizes.values()))


def unrolled(branch: Branch, u: Tensor, iterations: int) -> Tensor:
    """Picard iterations of z = u + F(z) with autograd through all of them."""
    z = u
    for _ in range(iterations):
        z = u + branch(z)
    return z


def memory_against_iterations(counts: Sequence[int], size: int = 16) -> tuple[list[Saved], list[Saved]]:
    """(unrolled, implicit) for each number of iterations."""
    branch = contractive_branch()
    u = torch.randn(4, 8, size, size, generator=torch.Generator().manual_seed(1))
    through, implicit = [], []
    for count in counts:
        through.append(saved(lambda count=count: unrolled(branch, u, count), u))  # type: ignore[misc]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopped after `count` iterations on purpose
            solver = FixedPoint(count)
            implicit.append(
                saved(lambda solver=solver: solve(branch, u, solver=solver, tol=1e-6, on_failure="warn"), u)  # type: ignore[misc]
            )
    return through, implicit


def memory(pictures: Path | None) -> None:
    counts = (1, 2, 5, 10, 20, 50)
    through, implicit = memory_against_iterations(counts)
    rows = [
        [str(count), f"{a.units:.1f}", f"{b.units:.1f}", str(a.inputs), str(b.inputs)]
        for count, a, b in zip(counts, through, implicit, strict=True)
    ]
    header = ("iterations", "unrolled, units", "implicit, units", "unrolled, tensors", "implicit, tensors")
    print(table("Saved for backward, in units of the block's input (conv, SiLU, conv; 8 channels)", header, rows))
    if pictures is not None:
        figure = new_figure(6.4, 4.2)
        axes = figure.subplots()
        axes.loglog(counts, [s.units for s in through], "o-", label="autograd through every iteration")
        axes.loglog(counts, [s.units for s in implicit], "s-", label="implicit differentiation")
        axes.set(
            xlabel="iterations of the solver",
            ylabel="saved for backward, in block inputs",
            title="Memory of one implicit block",
        )
        axes.set_xticks(counts, [str(c) for c in counts])
        axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        _draw(figure, pictures / "implicit_memory.png")


# --- calls ------------------------------------------------------------------------------------------------------------


def block_calls(fn: Callable[[], Any]) -> int:
    """How often fn calls the fused block operator."""
    count, original = 0, functional.residual_block

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    functional.residual_block = counted
    try:
        fn()
    finally:
        functional.residual_block = original
    return count


def calls(_: Path | None) -> None:
    """What a step costs beside the bare block call: new step sizes and times, which evaluation packs anew."""
    x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    net = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    branch, timed = Branch(*net).eval(), Branch(*net, time_dependent=True).eval()
    steps = (("euler", 100), ("heun", 50), ("rk4", 25))
    counted = [
        [m, str(n), str(block_calls(lambda m=m, n=n: Flow(branch, n, T=1.0, method=m)(x)))]  # type: ignore[misc]
        for m, n in steps
    ]
    print(table("Fused calls of a flow", ("method", "steps", "calls"), counted))
    fresh = iter(range(10**9))
    cases: dict[str, Callable[[], Tensor]] = {
        "F(x)": lambda: branch(x),
        "step(x, dt), dt as before": lambda: branch.step(x, 0.1),
        "step(x, dt), a new dt": lambda: branch.step(x, 0.1 + 1e-6 * next(fresh)),
        "x + dt * F(x), a new dt": lambda: torch.add(x, branch(x), alpha=0.1 + 1e-6 * next(fresh)),
        "step(x, dt, t), t as before": lambda: timed.step(x, 0.1, 0.5),
        "step(x, dt, t), a new t": lambda: timed.step(x, 0.1, 1e-6 * next(fresh)),
        "PyTorch: x + dt * net(x)": lambda: torch.add(x, branch.net(x), alpha=0.1),
    }
    with torch.no_grad():
        evaluation = {name: _microseconds(fn) for name, fn in cases.items()}
    training = {name: _microseconds(fn) for name, fn in cases.items()}
    rows = [[name, f"{evaluation[name]:.0f}", f"{training[name]:.0f}"] for name in cases]
    print(table("Microseconds, 1x16x32x32, medians of 200", ("call", "evaluation", "with autograd, forward"), rows))


def _microseconds(fn: Callable[[], Any], runs: int = 200) -> float:
    taken = []
    for run in range(runs + 10):
        start = time.perf_counter()
        fn()
        if run >= 10:
            taken.append(time.perf_counter() - start)
    return sorted(taken)[runs // 2] * 1e6


def _draw(figure: Figure, file: Path) -> None:
    save(figure, file)
    print(f"drawn: {file}")


PARTS = {"orders": orders, "stiff": stiff, "memory": memory, "calls": calls}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all without any")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the figures into this folder")
    args = parser.parse_args(arguments)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    for part in args.parts or PARTS:
        PARTS[part](args.pictures)
        print()


if __name__ == "__main__":
    main()
