"""Fifty layers with and without skip paths (arXiv:1512.03385, section 4.2) learn scikit-learn's digits, or do not.

python examples/plain_and_residual.py            # under two minutes on two cores; saves a picture
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import models
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.tables import table


class Setting(NamedTuple):
    depth: int
    epochs: int
    images: int  # of 1,797; a quarter of them for testing
    seed: int
    skip: bool


class Result(NamedTuple):
    """losses: of every step. accuracy: on the test images, after the last epoch."""

    setting: Setting
    losses: list[float]
    accuracy: float


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=50, help="6 n + 2 layers (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1797, help="of scikit-learn's digits (default: all, 1797)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--processes", type=int, default=2, help="networks at once, of one thread each; 0: in this process"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/plain_and_residual.png"))
    args = parser.parse_args(argv)

    settings = [
        Setting(args.depth, args.epochs, args.images, seed, skip)
        for seed in range(args.seeds)
        for skip in (True, False)
    ]
    if args.processes:
        with ProcessPoolExecutor(
            args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        ) as pool:
            results = list(pool.map(train, settings))
    else:
        results = [train(setting) for setting in settings]
    rows = []
    for skip in (True, False):
        each = [result.accuracy for result in results if result.setting.skip == skip]
        mean = sum(each) / len(each)
        rows.append([_name(args.depth, skip), *(f"{100 * a:.1f} %" for a in each), f"{100 * mean:.1f} %"])
    header = ("", *(f"seed {seed}" for seed in range(args.seeds)), "mean")
    print(table(f"Test accuracy after {args.epochs} epochs on the digits (chance: 10 %)", header, rows))
    draw(results, args.out)
    print(f"saved {args.out}")
    return results


def train(setting: Setting) -> Result:
    """SGD with momentum; the rate rises to 0.05 and falls again. Both networks see the same batches."""
    x, y = digits(setting.images)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(setting.seed))
    tests, trains = order[: len(x) // 4], order[len(x) // 4 :]
    torch.manual_seed(setting.seed)
    model = models.small_resnet(setting.depth, in_channels=1, skip=setting.skip).to(memory_format=torch.channels_last)
    torch.manual_seed(setting.seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    batches = [batch for _ in range(setting.epochs) for batch in trains[torch.randperm(len(trains))].split(64)]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=len(batches))
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model.eval()(x[tests]).argmax(1) == y[tests]).float().mean().item()
    return Result(setting, losses, accuracy)


def digits(images: int) -> tuple[Tensor, Tensor]:
    """x: float32 [images, 1, 8, 8] of mean 0 and deviation 1. y: the digits, int64 [images]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install resnet_fused[pictures]") from error
    data = load_digits()
    x = torch.tensor(data.images[:images], dtype=torch.float32)[:, None]
    return ((x - x.mean()) / x.std()).contiguous(memory_format=torch.channels_last), torch.tensor(data.target[:images])


def draw(results: list[Result], out: Path) -> None:
    """The running mean of each training loss; a line for each seed."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for result in results:
        losses = torch.tensor(result.losses)
        width = min(10, len(losses))
        smooth = losses.unfold(0, width, 1).mean(1)
        colour = "tab:blue" if result.setting.skip else "tab:orange"
        label = _name(result.setting.depth, result.setting.skip) if result.setting.seed == 0 else None
        axes.plot(range(width - 1, len(losses)), smooth, color=colour, alpha=0.8, label=label)
    axes.axhline(torch.tensor(10.0).log().item(), color="grey", linestyle=":", label="guessing, ln 10")
    axes.set(
        xlabel="step", ylabel="training loss, mean of 10 steps", title="The same layers with and without skip paths"
    )
    axes.set_ylim(0, max(3.0, axes.get_ylim()[1]))
    axes.legend()
    save(figure, out)


def _name(depth: int, skip: bool) -> str:
    return f"{'residual' if skip else 'plain'}, {depth} layers"


if __name__ == "__main__":
    main()
