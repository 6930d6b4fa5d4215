"""The effective receptive field: how much of a unit's gradient comes from which pixel, with and without skip paths.

The theoretical field is all that a unit could see; most of its gradient comes from a Gaussian-like centre (Luo et al.,
arXiv:1701.04128). The map here is the mean over random inputs of the squared gradient of one unit to each pixel, the
unit in the middle of a layer's output, its channels summed with random signs. Mean squares have an exact theory for
linear layers with independent random weights: a convolution of k taps smears the map evenly over them, so variances
add up,

    plain:     sigma^2 = L (k^2 - 1) / 12        residual:  sigma^2 = c / (1 + c)  L (k^2 - 1) / 12

for L convolutions and c the branch's share of energy beside the skip's 1: half the variance where they are equal.

The fused operators run here, forward and backward, with the running statistics of batch norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.analysis import panels
from resnet_fused.analysis.blocks import blocks, settle_statistics, without_skips
from resnet_fused.analysis.chains import linear_conv_chain
from resnet_fused.analysis.geometry import Geometry, geometry
from resnet_fused.errors import NotFusable
from resnet_fused.spec import Skip
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.5, 0.9, 0.95)
AT_ONCE = 4  # inputs
CELLS = 56  # of the drawn map, along an edge


@dataclass(frozen=True)
class ReceptiveField:
    """The map of one unit and its width, in pixels of the input.

    theoretical: the side of the square that the unit could see, the picture's edge not counted.
    sigma:       of the Gaussian with the map's second moments about its mean, over both axes.
    radii:       of the circles around the theoretical centre that hold 50, 90 and 95 % of the map's sum.
    centre:      the theoretical centre (row, column); mean: the map's own.
    map:         [H, W] float64, its sum 1; not in the JSON.
    """

    name: str
    theoretical: int
    sigma: float
    radii: tuple[float, ...]
    centre: tuple[float, float]
    mean: tuple[float, float]
    map: Tensor

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["map"]
        return found


@dataclass(frozen=True)
class ReceptiveFields:
    """Several maps; `missing` says why there is no plain network among them, or is None."""

    title: str
    rows: tuple[ReceptiveField, ...]
    missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "fields": [row.to_dict() for row in self.rows], "missing": self.missing}

    def table(self) -> str:
        header = ("network", "theoretical px", "sigma px", *(f"{share:.0%} within px" for share in SHARES))
        rows = [
            [row.name, str(row.theoretical), f"{row.sigma:.2f}", *(f"{radius:.1f}" for radius in row.radii)]
            for row in self.rows
        ]
        told = table(self.title, header, rows)
        return told if self.missing is None else f"{told}\nno plain network beside it: {self.missing}"


@dataclass(frozen=True)
class ChainField:
    """A chain of linear fused convolutions with random weights: sigma as measured and by the formula above (c = 1)."""

    depth: int
    kernel: int
    skip: Skip
    field: ReceptiveField
    formula: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "depth": self.depth,
            "kernel": self.kernel,
            "skip": self.skip,
            "formula": self.formula,
            "field": self.field.to_dict(),
        }


@dataclass(frozen=True)
class ChainFields:
    rows: tuple[ChainField, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"chains": [row.to_dict() for row in self.rows]}

    def table(self) -> str:
        header = (
            "convolutions",
            "skip",
            "theoretical px",
            "sigma px",
            "by formula",
            *(f"{s:.0%} within px" for s in SHARES),
        )
        rows = [
            [
                str(row.depth),
                row.skip,
                str(row.field.theoretical),
                f"{row.field.sigma:.3f}",
                f"{row.formula:.3f}",
                *(f"{radius:.1f}" for radius in row.field.radii),
            ]
            for row in self.rows
        ]
        kernel = self.rows[0].kernel
        title = f"Effective receptive field of chains of fused {kernel} x {kernel} convolutions"
        return table(title, header, rows)


def measure_map(f: Callable[[Tensor], Tensor], x: Tensor, signs: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Mean squared gradient [H, W], its sum 1, and the unit's place in f(x) [N, C', h, w].

    x: [N, C, H, W]; signs: [N, C'] weights of the unit's channels. Raises ValueError where every gradient is 0.
    """
    x = x.detach().requires_grad_()
    y = f(x)
    place = y.shape[2] // 2, y.shape[3] // 2
    unit = (y[:, :, place[0], place[1]] * signs).sum()
    (gradient,) = torch.autograd.grad(unit, x)
    energy = gradient.double().square().sum((0, 1))
    if not energy.sum() > 0:
        raise ValueError("every gradient of the unit is 0 or NaN; where branches start at zero, see open_branches")
    return energy / energy.sum(), place


def describe_map(energy: Tensor, name: str, theoretical: int, centre: tuple[float, float]) -> ReceptiveField:
    """The numbers of a map [H, W] whose sum is 1."""
    rows, columns = (torch.arange(n, dtype=energy.dtype) for n in energy.shape)
    moments = []
    for share, places in ((energy.sum(1), rows), (energy.sum(0), columns)):
        mean = float(share @ places)
        moments.append((mean, float(share @ (places - mean).square())))
    distance = torch.hypot(rows[:, None] - centre[0], columns[None, :] - centre[1]).flatten()
    order = distance.argsort()
    held = energy.flatten()[order].cumsum(0)
    radii = tuple(float(distance[order[int((held < share).sum())]]) for share in SHARES)
    sigma = math.sqrt((moments[0][1] + moments[1][1]) / 2)
    return ReceptiveField(name, theoretical, sigma, radii, centre, (moments[0][0], moments[1][0]), energy)


def effective_field(
    model: nn.Module, layer: str | None = None, size: int = 224, inputs: int = 8, seed: int = 0, name: str = "model"
) -> ReceptiveField:
    """The effective receptive field of the unit in the middle of a layer's output, inputs from N(0, 1).

    model: in evaluation mode, with settled statistics (`blocks.settle_statistics`) if it is freshly made.
    layer: a module's qualified name; None: the last block whose theoretical field is no larger than the picture.

    Raises ValueError for an unknown layer (with near names), a size below the total stride, a model in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode, where units depend on the whole batch; accepted: model.eval()")
    found = geometry(model, size, compare=False)
    layer = _last_that_fits(model, found) if layer is None else layer
    grid = found.output(layer)
    centre = grid[0].unit(grid[0].size // 2), grid[1].unit(grid[1].size // 2)
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, given, output: seen.append(output))

    def up_to_layer(x: Tensor) -> Tensor:
        seen.clear()
        model(x)
        return seen[0]

    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    total = torch.zeros(size, size, dtype=torch.float64)
    try:
        for count in _parts(inputs):
            x = torch.randn(count, 3, size, size, generator=generator).to(dtype)
            with torch.no_grad():
                channels = up_to_layer(x[:1]).shape[1]
            total += count * measure_map(up_to_layer, x, _signs(count, channels, generator).to(dtype))[0]
    finally:
        handle.remove()
    return describe_map(total / total.sum(), name, max(axis.field for axis in grid), centre)


def effective_fields(
    model: nn.Module, layer: str | None = None, size: int = 224, inputs: int = 8, seed: int = 0, name: str = "model"
) -> ReceptiveFields:
    """`effective_field` of the model and of its copy without skip paths, whose statistics are settled anew."""
    layer = _last_that_fits(model, geometry(model, size, compare=False)) if layer is None else layer
    found, missing = [effective_field(model, layer, size, inputs, seed, f"{name}, with skips")], None
    try:
        plain = without_skips(model)
        x = torch.randn(AT_ONCE, 3, size, size, generator=torch.Generator().manual_seed(seed))
        settle_statistics(plain, x.to(next(plain.parameters()).dtype))
        found.append(effective_field(plain, layer, size, inputs, seed, f"{name}, without skips"))
    except NotFusable as reason:
        missing = str(reason)
    title = f"Effective receptive field of the middle unit of {layer}, {size} x {size}, {inputs} inputs"
    return ReceptiveFields(title, tuple(found), missing)


def chain_field(
    depth: int, skip: Skip, kernel: int = 3, channels: int = 8, draws: int = 8, seed: int = 0
) -> ChainField:
    """The field of `depth` linear fused convolutions, averaged over `draws` of their random weights."""
    side = depth * (kernel - 1) + 1
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(draws):
        chain = linear_conv_chain(depth, channels, kernel, skip, generator)
        x = torch.randn(1, channels, side, side, generator=generator, dtype=torch.float64)
        total += measure_map(chain, x, _signs(1, channels, generator).double())[0]
    middle = float(side // 2)
    field = describe_map(total / draws, f"{depth} x {kernel}", side, (middle, middle))
    formula = math.sqrt(depth * (kernel**2 - 1) / 12 * (0.5 if skip == "identity" else 1.0))
    return ChainField(depth, kernel, skip, field, formula)


def chain_fields(depths: Sequence[int] = (5, 10, 20)) -> ChainFields:
    """`chain_field` by depth, without and with skips."""
    skips: tuple[Skip, Skip] = ("none", "identity")
    return ChainFields(tuple(chain_field(depth, skip) for depth in depths for skip in skips))


def figure(found: ReceptiveFields, title: str = "") -> Figure:
    """The maps, averaged over small squares, and their profile: the sum over columns by row."""
    import numpy as np

    drawn, axes = panels.side_by_side(len(found.rows) + 1, 4.6, 4.0, title)
    square = max(1, len(found.rows[0].map) // CELLS)
    coarse = [F.avg_pool2d(row.map[None], square)[0].numpy() for row in found.rows]
    top = max(shades.max() for shades in coarse)
    for axis, row, shades in zip(axes, found.rows, coarse, strict=False):
        high, wide = (square * n for n in shades.shape)
        edges = (-0.5, wide - 0.5, high - 0.5, -0.5)
        image = axis.imshow(np.log10(np.maximum(shades / top, 1e-5)), cmap="magma", vmin=-5, vmax=0, extent=edges)
        angle = np.linspace(0, 2 * np.pi, 200)
        for radius, share, colour in zip(row.radii, SHARES, ("#ffffff", "#7fd0ff", "#6ee7a0"), strict=True):
            axis.plot(
                row.centre[1] + radius * np.cos(angle),
                row.centre[0] + radius * np.sin(angle),
                color=colour,
                linewidth=1.3,
                label=f"{share:.0%}: {radius:.0f} px",
            )
        axis.set(xlim=(-0.5, row.map.shape[1] - 0.5), ylim=(row.map.shape[0] - 0.5, -0.5))
        axis.grid(False)
        axis.set_title(f"{row.name}\ntheoretical field {row.theoretical} px", fontsize=9)
        axis.set(xlabel="input column, px", ylabel="input row, px")
        axis.legend(fontsize=7, loc="lower left", facecolor="#222222", labelcolor="white", framealpha=0.7)
    drawn.colorbar(image, ax=axes[: len(found.rows)], label="log10 of the mean squared gradient", shrink=0.8)
    for row, colour in zip(found.rows, (panels.RESIDUAL, panels.PLAIN), strict=False):
        profile = row.map.sum(1).numpy()
        axes[-1].plot(profile, color=colour, label=f"{row.name}: sigma {row.sigma:.1f} px")
    axes[-1].set_ylim(top=1.25 * axes[-1].get_ylim()[1])
    axes[-1].set(xlabel="input row, px", ylabel="share of the squared gradient")
    axes[-1].legend(fontsize=8, loc="upper left")
    return drawn


def _last_that_fits(model: nn.Module, found: Geometry) -> str:
    """The last block whose field the picture holds, or the first block."""
    names = [name for name in blocks(model) if name in found.outputs]
    fitting = [name for name in names if found.output(name)[0].field <= found.size]
    return (fitting or names[:1])[-1]


def _parts(count: int) -> list[int]:
    if count < 1:
        raise ValueError(f"inputs is {count}; accepted: 1 or more")
    return [min(AT_ONCE, count - i) for i in range(0, count, AT_ONCE)]


def _signs(count: int, channels: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count, channels), generator=generator) * 2 - 1
