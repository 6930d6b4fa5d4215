"""A deep equilibrium ResNet beside its unrolled twin, on scikit-learn's handwritten digits: accuracy and memory.

Both have the same layers and as many parameters: a stem, a weight-tied residual block z <- u + F(z), a classifier. The
twin applies the block DEPTH times with autograd through all of it; the equilibrium model finds where z = u + F(z) and
differentiates the equation (arXiv:1909.01377), so what it keeps for backward does not depend on the iterations.

python examples/deq.py [--picture FILE]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.flows import Anderson, Branch, DeepEquilibrium
from resnet_fused.flows.measure import saved, unrolled
from resnet_fused.tools.figures import new_figure, save
from resnet_fused.tools.tables import table

DEPTHS = (5, 10, 20, 40)


@dataclass(frozen=True)
class Setting:
    """channels of the block; depth of the twin that is trained; epochs over `images` pictures in batches."""

    channels: int = 24
    depth: int = 20
    epochs: int = 8
    images: int = 1797
    batch: int = 64
    learning_rate: float = 3e-3
    tol: float = 1e-3


class Unrolled(nn.Module):
    """z <- u + F(z), `depth` times from z = u."""

    def __init__(self, branch: Branch, depth: int) -> None:
        super().__init__()
        self.branch, self.depth = branch, depth

    def forward(self, u: Tensor) -> Tensor:
        return unrolled(self.branch, u, self.depth)


class Digits(nn.Module):
    """stem -> block -> classifier: [N, 1, 8, 8] -> [N, 10]."""

    def __init__(self, channels: int, depth: int | None, tol: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        for conv in (first, second):  # F contracts at first
            nn.init.normal_(conv.weight, std=0.5 / (9 * channels) ** 0.5)
        branch = Branch(first, nn.SiLU(), second)
        self.block: nn.Module
        if depth is None:
            self.block = DeepEquilibrium(branch, solver=Anderson(), tol=tol)
        else:
            self.block = Unrolled(branch, depth)
        self.last_norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.bn(self.conv(x)))
        z = F.relu(self.last_norm(self.block(u)))
        return self.head(F.avg_pool2d(z, 2).flatten(1))


@dataclass
class Result:
    """accuracy: on the test pictures after each epoch. saved: bytes for backward of one batch. seconds: of all cores.

    iterations: of the solver on the test pictures after each epoch, None for the twin.
    """

    name: str
    accuracy: list[float]
    saved: int
    seconds: float
    iterations: list[int] | None
    parameters: int


def data(images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pictures, labels) to train with and to test with, the latter every fifth; pictures [N, 1, 8, 8] in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the digits need scikit-learn: `pip install resnet_fused[pictures]` (import said: {error})"
        ) from error
    digits = load_digits()
    x = torch.tensor(digits.images[:images], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target[:images])
    test = torch.arange(len(x)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


def train(name: str, depth: int | None, setting: Setting) -> Result:
    """The model of that depth, None for the equilibrium; both from the same weights, in the same order of batches."""
    x, y, x_test, y_test = data(setting.images)
    torch.manual_seed(0)
    model = Digits(setting.channels, depth, setting.tol).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=1e-2)
    result = Result(name, [], 0, 0.0, [] if depth is None else None, sum(p.numel() for p in model.parameters()))
    start = time.process_time()
    for _ in range(setting.epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(setting.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            result.accuracy.append(float((model(x_test).argmax(1) == y_test).float().mean()))
        if result.iterations is not None:
            result.iterations.append(int(model.block.report.iterations.max()))  # type: ignore[union-attr]
    result.seconds = time.process_time() - start
    result.saved = bytes_saved(model, x[: setting.batch])
    return result


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps for backward of one training batch."""
    return saved(lambda: model.train()(x), x).total


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Setting().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--picture", type=Path, help="draw accuracy and memory into this PNG file")
    given = vars(parser.parse_args(arguments))
    picture = given.pop("picture")
    setting = Setting(**given)
    results = [
        train("deep equilibrium", None, setting),
        train(f"unrolled, {setting.depth} deep", setting.depth, setting),
    ]
    print(report(results, setting))
    torch.manual_seed(0)
    batch = data(setting.images)[0][: setting.batch]
    memory = {
        d: bytes_saved(Digits(setting.channels, d, setting.tol).to(memory_format=torch.channels_last), batch)
        for d in DEPTHS
    }
    print(
        table(
            "Saved for backward by depth",
            ("unrolled depth", "KiB"),
            [[str(d), f"{b / 1024:.0f}"] for d, b in memory.items()],
        )
    )
    if picture is not None:
        draw(results, memory, picture)
    return results


def report(results: list[Result], setting: Setting) -> str:
    rows = [
        [
            r.name,
            str(r.parameters),
            f"{100 * r.accuracy[-1]:.1f}",
            f"{r.saved / 1024:.0f}",
            "" if r.iterations is None else f"{r.iterations[0]} to {max(r.iterations)}",
            f"{r.seconds:.1f}",
        ]
        for r in results
    ]
    header = ("model", "parameters", "test accuracy, %", "saved for backward, KiB", "iterations", "CPU seconds")
    title = f"Digits, {setting.epochs} epochs, batches of {setting.batch}, {torch.get_num_threads()} threads"
    return table(title, header, rows)


def draw(results: list[Result], memory: dict[int, int], path: Path) -> None:
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    for result, style in zip(results, ("s-", "o-"), strict=True):
        epochs = range(1, len(result.accuracy) + 1)
        left.plot(epochs, [100 * a for a in result.accuracy], style, label=result.name, markersize=4)
    left.set(xlabel="epoch", ylabel="accuracy on the test digits, %", title="Accuracy")
    left.legend(loc="lower right")
    depths = list(memory)
    right.plot(depths, [memory[d] / 2**20 for d in depths], "o-", color="C1", label="unrolled")
    right.axhline(results[0].saved / 2**20, color="C0", label="deep equilibrium")
    right.set(
        xlabel="depth",
        ylabel="saved for backward, MiB a batch",
        title="Memory",
        ylim=(0, 1.2 * max(memory.values()) / 2**20),
    )
    right.set_xticks(depths)
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, path)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
