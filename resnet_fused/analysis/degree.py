"""The degree of a polynomial network: which powers of its input its output holds, and how much of each.

With activation x^m a plain chain x_{l+1} = x_l^m of L blocks is x^(m^L) and nothing else. A residual chain
x_{l+1} = x_l + x_l^m has the same highest power and lower ones down to x itself, one path of the unravelled network
(arXiv:1605.06431) for each product. All weights are 1, so that coefficients can be checked by hand: L = 2, m = 2 gives
x + 2 x^2 + 2 x^3 + x^4.

x^m is none of the package's activations: a block is PyTorch's power, a fused 1x1 convolution and PyTorch's addition.
Two measurements:

- degree: values on Chebyshev points of [-1, 1] through the fused operators in float64, interpolated in the Chebyshev
  basis, which is well conditioned; the degree is that of the last coefficient above rounding.
- coefficients: values on the unit circle, of which they are the discrete Fourier transform (Cauchy's integral). The
  fused operators take no complex numbers, so these values come from the formula in plain PyTorch (ops.reference).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from resnet_fused import functional
from resnet_fused.analysis import panels
from resnet_fused.analysis.chains import scalar_chain
from resnet_fused.ops import reference
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["plain", "residual"]
LARGEST = {"plain": 48, "residual": 27}  # degrees m^L that float64 resolves, see `_noise`


@dataclass(frozen=True)
class Degree:
    """A polynomial network's measured degree and coefficients.

    degree:       of the last Chebyshev coefficient above `noise`.
    coefficients: c_k of sum_k c_k x^k, k = 0 ... m^L; those below the rounding of their measurement are 0.
    """

    kind: Kind
    power: int
    depth: int
    degree: int
    coefficients: tuple[float, ...]
    noise: float

    @property
    def powers(self) -> tuple[int, ...]:
        """The powers that the output holds."""
        return tuple(k for k, c in enumerate(self.coefficients) if c)


@dataclass(frozen=True)
class Degrees:
    rows: tuple[Degree, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) | {"powers": row.powers} for row in self.rows]}

    def table(self) -> str:
        header = (
            "activation",
            "blocks",
            "network",
            "m^L",
            "degree",
            "powers held",
            "coefficients of the lowest powers",
        )
        rows = []
        for r in self.rows:
            held = f"{r.powers[0]}" if len(r.powers) == 1 else f"{r.powers[0]} to {r.powers[-1]}: {len(r.powers)}"
            first = ", ".join(f"{r.coefficients[k]:.4g} x^{k}" for k in r.powers[:4])
            depth, top = str(r.depth), str(r.power**r.depth)
            rows.append([f"x^{r.power}", depth, r.kind, top, str(r.degree), held, first])
        return table("Degree of a polynomial network, all weights 1", header, rows)


def degree(power: int, depth: int, kind: Kind) -> Degree:
    """Measure one network. Raises ValueError for power < 2, depth < 1, or a degree beyond what float64 resolves."""
    top = power**depth if power >= 2 and depth >= 1 else 0
    if kind not in LARGEST or not 0 < top <= LARGEST[kind]:
        raise ValueError(
            f"got power {power}, depth {depth}, kind {kind!r}: degree {power}^{depth}; accepted: power >= 2, "
            f"depth >= 1, kind {' or '.join(map(repr, LARGEST))}, and in float64 degrees up to {LARGEST['plain']} "
            f"plain, {LARGEST['residual']} residual"
        )
    spread = _chebyshev(power, depth, kind, top + 8)
    noise = _noise(spread)
    measured = int((spread.abs() > noise).nonzero().max())
    return Degree(kind, power, depth, measured, _coefficients(power, depth, kind, top), noise)


def degrees(cases: Sequence[tuple[int, int]] = ((2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3))) -> Degrees:
    """Plain and residual networks for each (power, depth)."""
    kinds: tuple[Kind, Kind] = ("plain", "residual")
    return Degrees(tuple(degree(power, depth, kind) for power, depth in cases for kind in kinds))


def network(x: Tensor, power: int, depth: int, kind: Kind) -> Tensor:
    """x: [N] -> [N]; float64 through the fused operators, complex128 through their plain PyTorch formula."""
    block = reference.residual_block if x.is_complex() else functional.residual_block
    ((params, spec),) = scalar_chain(1.0, 1, "none", x.dtype).blocks
    x = x.reshape(-1, 1, 1, 1)
    for _ in range(depth):
        branch = block(x**power, params, spec)
        x = branch if kind == "plain" else x + branch
    return x.flatten()


def figure(found: Degrees, title: str = "") -> Figure:
    """The coefficients by power of the deepest network of each activation."""
    powers = sorted({row.power for row in found.rows})
    drawn, axes = panels.side_by_side(len(powers), 5.2, 3.8, title)
    for axis, power in zip(axes, powers, strict=True):
        depth = max(row.depth for row in found.rows if row.power == power)
        for row in found.rows:
            if (row.power, row.depth) != (power, depth):
                continue
            colour, marker = (panels.PLAIN, "s") if row.kind == "plain" else (panels.RESIDUAL, "o")
            values = [abs(row.coefficients[k]) for k in row.powers]
            label = f"{row.kind}: {len(values)} power{'s' if len(values) > 1 else ''}"
            axis.plot(row.powers, values, marker, markersize=5, color=colour, label=label, linestyle="none")
            axis.vlines(row.powers, 0.5, values, color=colour, alpha=0.4, linewidth=1)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5)
        axis.set(xlabel="power of x", ylabel="coefficient")
        axis.set_title(f"activation x^{power}, {depth} blocks", fontsize=10)
        axis.legend(fontsize=8)
    return drawn


def _chebyshev(power: int, depth: int, kind: Kind, highest: int) -> Tensor:
    """Coefficients c_0 ... c_highest of the interpolant in T_k at the Chebyshev points of the first kind."""
    n = highest + 1
    angles = math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    values = network(torch.cos(angles), power, depth, kind)
    modes = torch.cos(torch.outer(torch.arange(n, dtype=torch.float64), angles))
    spread = 2 / n * modes @ values
    spread[0] /= 2
    return spread


def _noise(spread: Tensor) -> float:
    """What rounding leaves in a coefficient, with a factor of ten: eps times the largest, times the terms summed."""
    return 10 * float(spread.abs().max()) * torch.finfo(torch.float64).eps * math.sqrt(len(spread))


def _coefficients(power: int, depth: int, kind: Kind, top: int) -> tuple[float, ...]:
    n = 2 * (top + 1)
    circle = torch.exp(2j * math.pi * torch.arange(n, dtype=torch.float64) / n)
    values = network(circle, power, depth, kind)
    found = torch.fft.fft(values).real / n
    noise = 10 * float(values.abs().max()) * torch.finfo(torch.float64).eps * top
    return tuple(float(c) if abs(c) > noise else 0.0 for c in found[: top + 1])
