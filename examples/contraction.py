"""Residual blocks x + g(x) that are invertible because g contracts (i-ResNet, arXiv:1811.00995), trained and inverted.

python examples/contraction.py            # under two minutes on two cores; saves a picture

The same network learns scikit-learn's digits twice, with and without `scaling.Contractive`, which keeps Lip(g) at 0.9.
Then test images are computed back from the features, block by block: x <- y - g(x) contracts, so that its error falls
to 0.9 of it or less each time, whatever y is. Without the constraint nothing says that it does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models, spectral
from resnet_fused.scaling import Contractive
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.tables import table

BETA = 0.9
COUNTS = (1, 2, 5, 10, 20, 30, 50, 70, 100)  # iterations in each block
SHOWN = (1, 10, 30, 100)


class Inversion(NamedTuple):
    """bound: the largest Lip(g) of the blocks. errors: after `COUNTS` iterations, the largest of all pixels (0 to 1).

    images, features, restored: [N, 1, 8, 8] of some test images.
    """

    name: str
    accuracy: float
    bound: float
    errors: list[float]
    images: Tensor
    features: Tensor
    restored: Tensor


def main(argv: list[str] | None = None) -> list[Inversion]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1797, help="of scikit-learn's digits (default: all, 1797)")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/contraction.png"))
    args = parser.parse_args(argv)

    found = [run(constrained, args.blocks, args.epochs, args.images) for constrained in (True, False)]
    rows = [
        [f.name, f"{100 * f.accuracy:.1f} %", f"{f.bound:.3g}", *(f"{f.errors[COUNTS.index(n)]:.1e}" for n in SHOWN)]
        for f in found
    ]
    header = ("", "test accuracy", "largest Lip(g)", *(f"error after {n}" for n in SHOWN))
    print(table("Digits computed back from their features: the largest error of a pixel, 0 to 1", header, rows))
    draw(found, args.out)
    print(f"saved {args.out}")
    return found


def run(constrained: bool, count: int, epochs: int, images: int) -> Inversion:
    """In float64, so that the iteration's end is seen."""
    x, y = digits(images)
    tests, trains = slice(0, len(x) // 4), slice(len(x) // 4, None)
    torch.manual_seed(0)
    # four pixels side by side become four channels, which can be undone
    blocks = nn.Sequential(*(models.PreBasicBlock(4, 4, norm_layer=lambda width: nn.Identity()) for _ in range(count)))
    net = nn.Sequential(nn.PixelUnshuffle(2), blocks, nn.Flatten(), nn.Linear(64, 10)).double()
    resnet_fused.fuse(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    constraint = Contractive(net, BETA, x[:1])
    if constrained:
        constraint.apply()
        constraint.attach(optimizer)
    for _ in range(epochs):
        for batch in torch.randperm(len(x[trains])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[trains][batch]), y[trains][batch]).backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (net(x[tests]).argmax(1) == y[tests]).double().mean().item()
        given = net[0](x[tests][:64])
        features = blocks(given)
        restored = [invert(blocks, features, n) for n in COUNTS]
        errors = [error(each, given) for each in restored]
    bound = max(bounds.branch for bounds in constraint.bounds().values())
    undo = nn.PixelShuffle(2)
    name = f"Lip(g) ≤ {BETA}" if constrained else "unconstrained"
    return Inversion(name, accuracy, bound, errors, undo(given[:8]), undo(features[:8]), undo(restored[-1][:8]))


def invert(blocks: nn.Sequential, y: Tensor, iterations: int) -> Tensor:
    """The x of which the blocks make y, from the last block to the first."""
    for block in reversed(blocks):
        g, _ = spectral.paths(*spectral.described(block))
        x = y
        for _ in range(iterations):
            x = y - g(x)
        y = x
    return y


def error(restored: Tensor, x: Tensor) -> float:
    """The largest; infinite where the iteration has left all numbers."""
    return float((restored - x).abs().max().nan_to_num(torch.inf))


def digits(images: int) -> tuple[Tensor, Tensor]:
    """x: float64 [images, 1, 8, 8] in 0 to 1. y: the digits, int64 [images]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install resnet_fused[pictures]") from error
    data = load_digits()
    return torch.tensor(data.images[:images] / 16)[:, None], torch.tensor(data.target[:images])


def draw(found: list[Inversion], out: Path) -> None:
    figure = new_figure(7, 6.4, dpi=100)
    above, below = figure.subplots(2, 1, height_ratios=(3, 2.2))
    for inversion in found:
        errors = [e if 0 < e < 1e6 else float("nan") for e in inversion.errors]
        label = inversion.name if inversion.bound < 1 else f"{inversion.name}: Lip(g) ≤ {inversion.bound:.3g}"
        above.semilogy(COUNTS, errors, "o-", label=label)
    above.set(
        xlabel="iterations in each block", ylabel="largest error of a pixel", title="Inverting trained residual blocks"
    )
    above.legend()
    first = found[0]
    rows = [torch.cat(list(each[:, 0]), 1) for each in (first.images, first.features, first.restored)]
    scaled = [(row - row.min()) / (row.max() - row.min()) for row in rows]
    below.imshow(torch.cat([F.pad(row, (0, 0, 1, 1), value=1.0) for row in scaled]), cmap="gray")
    below.set(
        xticks=[], yticks=[5, 15, 25], title=f"Where {first.name}: digits, what the blocks make of them, and back"
    )
    below.set_yticklabels(["digit", "features", "restored"])
    save(figure, out)


if __name__ == "__main__":
    main()
