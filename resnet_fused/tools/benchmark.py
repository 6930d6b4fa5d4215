"""Speed and memory of a whole model, eager and fused, measured in turns.

Every round runs each contestant once and the order rotates, so whatever else the machine does falls on all of them
alike; the figure that counts is the ratio of two contestants' times in the same round. Used by benches/ and the demo.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.modules.fuse import fuse
from resnet_fused.tools.saved_bytes import saved_bytes
from resnet_fused.tools.tables import table

PEER = "eager"
Step = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """One contestant; the peer of its ratios is "eager" in the same run.

    seconds:      of each round.
    ratios:       eager's seconds / its seconds, round by round.
    saved:        bytes saved for backward; None in evaluation and for compiled models.
    """

    name: str
    images: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    saved: int | None

    @property
    def images_per_second(self) -> float:
        return self.images / statistics.median(self.seconds)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The 20th, 50th and 80th percentile of the ratios."""
        low, *_, high = statistics.quantiles(self.ratios, n=5, method="inclusive")
        return low, statistics.median(self.ratios), high


def contestants(model: nn.Module, *, backend: str = "auto", compiled: bool = False) -> dict[str, nn.Module]:
    """Copies of an unfused model: "eager", "fused", "fused, low memory" and, if asked for, "torch.compile"."""
    models = {
        PEER: copy.deepcopy(model),
        "fused": fuse(copy.deepcopy(model), backend=backend),
        "fused, low memory": fuse(copy.deepcopy(model), backend=backend, memory="low"),
    }
    if compiled:
        models["torch.compile"] = torch.compile(copy.deepcopy(model))  # type: ignore[assignment]
    return models


def measure(
    models: Mapping[str, nn.Module],
    x: Tensor,
    labels: Tensor,
    *,
    train: bool,
    dtype: torch.dtype | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Time each model: forward and backward of the cross entropy if `train`, else evaluation without autograd.

    models:   "eager" among them; see `contestants`. Set to `train`; gradients and running statistics change.
    x, labels: [N, 3, H, W] and [N] int64.
    dtype:    torch.bfloat16 or torch.float16 for autocast, None for none.
    rounds:   after one round of warm-up; at least 2.

    Raises ValueError for too few rounds or without "eager".
    """
    if rounds < 2 or PEER not in models:
        raise ValueError(
            f"got rounds={rounds} and models {list(models)}; accepted: at least 2, and {PEER!r} among them"
        )
    steps = {name: _step(model.train(train), x, labels, train, dtype) for name, model in models.items()}
    seconds = interleaved(steps, rounds, progress)
    found = []
    for name, model in models.items():
        saved = None
        if train and not hasattr(model, "_orig_mod"):
            saved = saved_bytes(_forward(model, x, labels, dtype), model.buffers())
        ratios = tuple(peer / own for peer, own in zip(seconds[PEER], seconds[name], strict=True))
        found.append(Measurement(name, x.shape[0], tuple(seconds[name]), ratios, saved))
    return found


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one untimed round; clock: what tells the seconds."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            progress(f"{name}, round {turn} of {rounds}" if turn else f"{name}, warm-up")
            start = clock()
            steps[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def results(title: str, measurements: Sequence[Measurement]) -> str:
    """The measurements as a table."""
    eager = next(m for m in measurements if m.name == PEER)
    rows = []
    for m in measurements:
        low, middle, high = m.ratio
        row = [m.name, f"{m.images_per_second:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        if eager.saved is not None:
            row += ["", ""] if m.saved is None else [f"{m.saved / 2**20:.0f}", f"{m.saved / eager.saved:.2f}"]
        rows.append(row)
    header = ["", "images/s", "eager time / its time", "p20 to p80"]
    return table(title, header + (["saved MiB", "of eager's"] if eager.saved is not None else []), rows)


def _forward(model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with contextlib.nullcontext() if dtype is None else torch.autocast(x.device.type, dtype):
            return F.cross_entropy(model(x).float(), labels)

    return run


def _step(model: nn.Module, x: Tensor, labels: Tensor, train: bool, dtype: torch.dtype | None) -> Step:
    loss = _forward(model, x, labels, dtype)

    def training() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss())

    return training if train else torch.no_grad()(loss)
