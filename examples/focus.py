"""The focus of a receptive field, with and without skip paths, and the fovea.

The eye sees a wide field, and sharply only around its middle: the fovea covers about 2 of some 200 degrees, and the
central 10 degrees take over half of the primary visual cortex (Horton & Hoyt, Arch. Ophthalmol. 109, 1991). A deep
convolutional unit is alike: its theoretical field grows with depth, the part from which most of its gradient comes
only with the square root (Luo et al., arXiv:1701.04128). Skip paths focus it further: half of the signal takes each
short cut.

Chains of linear fused 3x3 convolutions with random weights, residual and plain, of the same depth.

    python examples/focus.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_fused.analysis import panels
from resnet_fused.analysis.receptive_field import ChainField, chain_field
from resnet_fused.tools.figures import save
from resnet_fused.tools.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def share_of_area(found: ChainField) -> float:
    """The circle that holds half of the squared gradient, over the square that the unit could see."""
    return float(np.pi * found.field.radii[0] ** 2 / found.field.theoretical**2)


def figure(by_depth: Sequence[tuple[ChainField, ChainField]]) -> Figure:
    """The deepest pair's maps, and the width by depth."""
    drawn, axes = panels.side_by_side(3, 4.2, 3.9, "The focus of a receptive field")
    top = max(float(each.field.map.max()) for each in by_depth[-1])
    for axis, each, name in zip(axes, by_depth[-1], ("without skips", "with skips"), strict=False):
        side, radius = each.field.theoretical, each.field.radii[0]
        half = side // 2
        edges = (-half - 0.5, half + 0.5, half + 0.5, -half - 0.5)
        image = axis.imshow(each.field.map.numpy() / top, cmap="magma", vmin=0, vmax=1, extent=edges)
        angle = np.linspace(0, 2 * np.pi, 200)
        axis.plot(radius * np.cos(angle), radius * np.sin(angle), color="white", linewidth=1.2)
        axis.text(0, -half + 1, f"half within {radius:.1f} px", color="white", ha="center", va="top", fontsize=8)
        axis.grid(False)
        axis.set(title=f"{name}, {each.depth} layers", xlabel="pixels from the unit's centre")
    drawn.colorbar(image, ax=axes[:2], label="squared gradient, over the largest", shrink=0.8)
    depths = [plain.depth for plain, _ in by_depth]
    for i, (name, colour) in enumerate((("without skips", panels.PLAIN), ("with skips", panels.RESIDUAL))):
        axes[2].plot(depths, [pair[i].field.sigma for pair in by_depth], "o", color=colour, label=f"{name}, measured")
        axes[2].plot(depths, [pair[i].formula for pair in by_depth], "-", color=colour, label=f"{name}, formula")
    axes[2].plot(depths, depths, "--", color=panels.SOFT, label="theoretical field, half its side")
    axes[2].set(xlabel="layers", ylabel="width of the field, px (sigma)", yscale="log", xscale="log")
    axes[2].set_xticks(depths, [str(depth) for depth in depths])
    axes[2].minorticks_off()
    axes[2].set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes[2].legend(fontsize=7)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 5, 10, 20], metavar="L", help="numbers of layers")
    parser.add_argument("--draws", type=int, default=16, help="of random weights (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture there")
    arguments = parser.parse_args(argv)

    by_depth = [
        (chain_field(depth, "none", draws=arguments.draws), chain_field(depth, "identity", draws=arguments.draws))
        for depth in sorted(arguments.depths)
    ]
    rows = [
        [
            str(each.depth),
            name,
            str(each.field.theoretical),
            f"{each.field.sigma:.2f}",
            f"{each.formula:.2f}",
            f"{each.field.radii[0]:.1f}",
            f"{share_of_area(each):.1%}",
        ]
        for pair in by_depth
        for name, each in zip(("no", "yes"), pair, strict=True)
    ]
    header = ("layers", "skips", "theoretical px", "sigma px", "by formula", "half within px", "of the area")
    print(table("Focus of the receptive field of a chain of 3x3 convolutions", header, rows))
    plain, residual = by_depth[-1]
    ratio = residual.field.sigma / plain.field.sigma
    print(f"skips narrow it to {ratio:.2f} of its width (1 / sqrt(2) = 0.71 by formula)")
    if arguments.plot is not None:
        save(figure(by_depth), arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
