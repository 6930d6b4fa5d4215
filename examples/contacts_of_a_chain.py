"""Long-range contacts of a chain as skip connections: a protein's disulfide bonds, and how fast its chain relaxes.

A chain of N units, neighbours joined by springs of stiffness 1, moves towards rest as dx/dt = -L x, L the Laplacian of
its contacts. One step of time, x - dt L x, is a residual block: the skip path is x, the branch a 1x1 convolution whose
weights are L (a unit is a channel), its scale -dt. So the relaxation runs through the fused operators, and autograd
through them tells by how many steps one end can hear the other.

Bovine ribonuclease A has 124 residues and four disulfide bonds: 26-84, 40-95, 58-110, 65-72. They are few, and long.

    python examples/contacts_of_a_chain.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_fused import BlockParams, BlockSpec, StageParams, StageSpec, functional
from resnet_fused.analysis import panels
from resnet_fused.tools.figures import save
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = 124
BONDS = ((26, 84), (40, 95), (58, 110), (65, 72))  # units from 1, as in the protein's numbering
STEP = 0.25  # of time; below 2 / (largest eigenvalue of L), here about 2 / 6


@dataclass(frozen=True)
class Relaxation:
    """rates: the eigenvalues of L, rising. measured: the slowest one as the simulation shows it.

    distance: steps until the last unit feels the first, by autograd. curve: |x(t)| over |x(0)| from the simulation, at
    times t = 0, STEP, ...
    """

    name: str
    rates: Tensor
    measured: float
    distance: int
    curve: Tensor

    @property
    def time(self) -> float:
        """The slowest mode falls to 1/e in this time."""
        return 1 / float(self.rates[1])


def laplacian(units: int, bonds: Sequence[tuple[int, int]]) -> Tensor:
    """L = degrees - contacts [units, units], float64: neighbours along the chain, and the bonds."""
    contacts = torch.zeros(units, units, dtype=torch.float64)
    for i, j in [*((k, k + 1) for k in range(1, units)), *bonds]:
        if not 1 <= i < j <= units:
            raise ValueError(f"bond {i}-{j} does not fit a chain of units 1 to {units}")
        contacts[i - 1, j - 1] = contacts[j - 1, i - 1] = 1
    return contacts.sum(1).diag() - contacts


def step(x: Tensor, matrix: Tensor) -> Tensor:
    """x - STEP matrix x as one fused residual block; x: [N, units, 1, 1]."""
    params = BlockParams((StageParams(matrix[:, :, None, None]),), branch_scale=-STEP)
    spec = BlockSpec((StageSpec(norm=False, batch_stats=False, act="identity"),), skip="identity")
    return functional.residual_block(x, params, spec)


def relax(matrix: Tensor, steps: int) -> tuple[Tensor, float]:
    """|x| at every step from a chain whose first unit is displaced, and the rate at which its last fifth decays."""
    x = torch.zeros(1, len(matrix), 1, 1, dtype=torch.float64)
    x[:, 0] = 1
    x -= x.mean()  # the mean stays: nothing holds the chain as a whole
    norms = [float(x.norm())]
    for _ in range(steps):
        x = step(x, matrix)
        norms.append(float(x.norm()))
    curve = torch.tensor(norms, dtype=torch.float64)
    late = steps // 5
    decay = (curve[-1] / curve[-1 - late]) ** (1 / late)  # 1 - STEP rate, of the slowest mode alone by now
    return curve / curve[0], float((1 - decay) / STEP)


def distance(matrix: Tensor) -> int:
    """Steps through fused blocks until the gradient of the last unit with respect to the first is not 0."""
    states = [torch.ones(1, len(matrix), 1, 1, dtype=torch.float64, requires_grad=True)]
    for _ in range(len(matrix) - 1):
        states.append(step(states[-1], matrix))
    gradients = torch.autograd.grad(states[-1][0, -1, 0, 0], states)
    return next(steps for steps, gradient in enumerate(reversed(gradients)) if gradient[0, 0] != 0)


def measure(name: str, units: int, bonds: Sequence[tuple[int, int]]) -> Relaxation:
    matrix = laplacian(units, bonds)
    rates = torch.linalg.eigvalsh(matrix)
    slowest, second = (float(rate) for rate in rates[1:3])
    # until the second mode has fallen to e^-12 of the slowest, while that is above rounding
    curve, measured = relax(matrix, steps=int(min(12 / (second - slowest), 25 / slowest) / STEP))
    return Relaxation(name, rates, measured, distance(matrix), curve)


def figure(found: Sequence[Relaxation], units: int, bonds: Sequence[tuple[int, int]]) -> Figure:
    """Left the chain with its bonds as arcs, right the relaxation."""
    import numpy as np

    drawn, (left, right) = panels.side_by_side(2, 5.4, 3.8, "Long-range contacts as skip connections")
    left.plot(range(1, units + 1), np.zeros(units), ".-", color=panels.SOFT, markersize=3, linewidth=0.8)
    for i, j in bonds:
        angle = np.linspace(0, np.pi, 60)
        left.plot((i + j) / 2 + (j - i) / 2 * np.cos(angle), (j - i) / 2 * np.sin(angle), color=panels.RESIDUAL)
        left.annotate(f"{i}-{j}", ((i + j) / 2, (j - i) / 2 + 0.8), ha="center", fontsize=8)
    left.set(xlabel="unit of the chain", yticks=[], title=f"{units} units and {len(bonds)} bonds")
    left.grid(False)
    for each, colour in zip(found, (panels.PLAIN, panels.RESIDUAL), strict=True):
        times = STEP * np.arange(len(each.curve))
        label = f"{each.name}: time {each.time:.0f}, {each.distance} steps from end to end"
        right.plot(times, each.curve.numpy(), color=colour, label=label)
    right.set_yscale("log")
    right.set_ylim(top=4)
    right.set(xlabel="time, in 1 / stiffness", ylabel="displacement that is left", title="relaxation, by fused steps")
    right.legend(fontsize=8, loc="upper right")
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=UNITS, help="of the chain (default: %(default)s)")
    parser.add_argument(
        "--bonds", nargs="*", default=[f"{i}-{j}" for i, j in BONDS], metavar="I-J", help="default: ribonuclease A's"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture there")
    arguments = parser.parse_args(argv)
    bonds = [(int(i), int(j)) for i, j in (bond.split("-") for bond in arguments.bonds)]

    found = [measure("chain", arguments.units, ()), measure("with bonds", arguments.units, bonds)]
    rows = [[r.name, f"{float(r.rates[1]):.3e}", f"{r.measured:.3e}", f"{r.time:.0f}", str(r.distance)] for r in found]
    header = ("", "slowest rate, eigenvalue", "by fused steps", "relaxation time", "gradient path, steps")
    print(table(f"A chain of {arguments.units} units, {len(bonds)} bonds", header, rows))
    print(f"with bonds it relaxes {found[0].time / found[1].time:.2f} times as fast")
    if arguments.plot is not None:
        save(figure(found, arguments.units, bonds), arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
