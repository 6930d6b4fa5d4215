"""How far a signal and its gradient get through 200 and 1,000 residual blocks x + a g(x), by the branch scale a.

python examples/depth_scaling.py            # under two minutes on two cores; saves a picture

The blocks are as they are initialised, pre-activation, without batch norms (which would hide what happens). Theory
(arXiv:2010.12859, arXiv:2206.06929): the root mean square grows by (1 + a^2)^(L / 2) over L blocks, both ways.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models
from resnet_fused.scaling import depth_scale
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.tables import table

SCALES: dict[str, Callable[[int], float]] = {
    "1": lambda blocks: 1.0,
    "1/√L": depth_scale,
    "1/L": lambda blocks: 1 / blocks,
}


class Passage(NamedTuple):
    """signal: the norm of x behind each block, of x_0. gradient: of the gradient for x before each, of that at the end.

    moved: |x_L - x_0| / |x_0|. predicted: (1 + a^2)^(L / 2).
    """

    blocks: int
    name: str
    signal: list[float]
    gradient: list[float]
    moved: float
    predicted: float


def main(argv: list[str] | None = None) -> list[Passage]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/depth_scaling.png"))
    args = parser.parse_args(argv)

    passages = [passage(blocks, name, args.channels) for blocks in args.blocks for name in SCALES]
    rows = [
        [f"{p.blocks}", p.name, f"{p.signal[-1]:.3g}", f"{p.gradient[0]:.3g}", f"{p.predicted:.3g}", f"{p.moved:.3g}"]
        for p in passages
    ]
    header = ("blocks", "scale", "signal, out / in", "gradient, in / out", "predicted", "|x_L - x_0| / |x_0|")
    print(table("Norms through residual blocks at initialisation", header, rows))
    draw(passages, args.out)
    print(f"saved {args.out}")
    return passages


def passage(blocks: int, name: str, channels: int, size: int = 16) -> Passage:
    """In float64: at scale 1 the numbers leave float32's range."""
    torch.manual_seed(0)
    scale = SCALES[name](blocks)
    net = nn.Sequential(*(_block(channels, scale) for _ in range(blocks))).double()
    resnet_fused.fuse(net)
    x = torch.randn(1, channels, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    points = [x.requires_grad_()]
    for block in net:
        points.append(block(points[-1]))
        points[-1].retain_grad()
    last = points[-1]
    last.backward(torch.randn(last.shape, dtype=last.dtype, generator=torch.Generator().manual_seed(1)))
    signal = [_norm(point) / _norm(x) for point in points]
    gradient = [_norm(point.grad) / _norm(last.grad) for point in points]
    moved = float((last - x).detach().norm()) / _norm(x)
    return Passage(blocks, name, signal, gradient, moved, (1 + scale**2) ** (blocks / 2))


def _block(channels: int, scale: float) -> nn.Module:
    """relu, 3x3, relu, 3x3, whose weights keep the mean square but for the borders (He et al., arXiv:1502.01852)."""
    block = models.PreBasicBlock(channels, channels, norm_layer=lambda width: nn.Identity(), branch_scale=scale)
    for conv in (block.conv1, block.conv2):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return block


def _norm(t: Tensor | None) -> float:
    assert t is not None
    return float(t.detach().norm())


def draw(passages: list[Passage], out: Path) -> None:
    depths = sorted({p.blocks for p in passages})
    figure = new_figure(4.4 * len(depths), 6, dpi=100)
    axes = figure.subplots(2, len(depths), squeeze=False)
    for p in passages:
        column = depths.index(p.blocks)
        for row, (norms, end) in enumerate(((p.signal, p.signal[-1]), (p.gradient, p.gradient[0]))):
            axes[row][column].semilogy(range(len(norms)), norms, label=f"scale {p.name}: ends at {end:.3g}")
    for column, blocks in enumerate(depths):
        axes[0][column].set(title=f"{blocks} blocks", ylabel="norm of x, 1 at the start")
        axes[1][column].set(xlabel="block", ylabel="norm of the gradient, 1 at the end")
        for row, free in enumerate(("upper right", "upper left")):
            axes[row][column].set_ylim(0.5, 50)  # the legend tells what leaves it
            axes[row][column].legend(loc=free)
    save(figure, out)


if __name__ == "__main__":
    main()
