"""Each fused block of a model beside its eager original: time, operations, bytes, what it saves for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused.backends.tune import block_inputs
from resnet_fused.modules.fuse import fuse, unfuse
from resnet_fused.tools.bench.rounds import Progress, Spread, interleaved, ratios, timed
from resnet_fused.tools.bench.task import Task
from resnet_fused.tools.comparison import Stem, has_stem
from resnet_fused.tools.saved_bytes import saved_bytes
from resnet_fused.tools.tables import table


@dataclass(frozen=True)
class Side:
    """seconds: the median of a step. bytes: that its operators read and write, each operand of each once.

    saved: bytes for backward, 0 in evaluation.
    """

    seconds: float
    bytes: int
    saved: int


@dataclass(frozen=True)
class BlockRow:
    """flops: of the eager block's convolutions, in both. ratio: eager's time / fused time in the same round."""

    name: str
    shape: tuple[int, ...]
    flops: int
    eager: Side
    fused: Side
    ratio: Spread

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio.to_dict()}


def measure_blocks(task: Task, rounds: int, progress: Progress = lambda _: None) -> list[BlockRow]:
    """In this process, with its threads; in training forward and backward from a gradient of ones."""
    model, x, _ = task.build()
    model, x = task.cast(model, x)
    fuse(model, backend=task.backend)
    with torch.no_grad(), task.context():
        blocks = block_inputs(model, x)
    rows = []
    for name, module, given in blocks:
        sides: dict[str, nn.Module] = {"eager": unfuse(copy.deepcopy(module)), "fused": copy.deepcopy(module)}
        if has_stem(module):  # the model itself
            name, sides = "stem", {key: Stem(side) for key, side in sides.items()}
        given = given.detach().requires_grad_(task.mode == "train" and name != "stem")
        steps = {key: _step(side, given, task) for key, side in sides.items()}
        turns = {key: timed(step) for key, step in steps.items()}
        seconds = interleaved(turns, rounds, lambda what, name=name: progress(f"{name}, {what}"))  # type: ignore[misc]
        with FlopCounterMode(display=False) as flops:
            steps["eager"]()
        measured = {
            key: Side(Spread.of(seconds[key]).middle, _traffic(steps[key]), _saved(side, given, task))
            for key, side in sides.items()
        }
        ratio = ratios(seconds["eager"], seconds["fused"])
        rows.append(BlockRow(name, tuple(given.shape), flops.get_total_flops(), **measured, ratio=ratio))
    return rows


def blocks_table(title: str, rows: list[BlockRow]) -> str:
    """A block per row, and the one that gains least over eager last."""
    cells = [
        [
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.eager.seconds * 1e3:.2f}",
            f"{row.fused.seconds * 1e3:.2f}",
            f"{row.ratio.middle:.2f}",
            str(row.ratio),
            f"{row.flops / row.fused.seconds / 1e9:.0f}",
            f"{row.eager.bytes / 2**20:.1f}",
            f"{row.fused.bytes / 2**20:.1f}",
        ]
        for row in rows
    ]
    header = (
        "block",
        "input",
        "eager ms",
        "fused ms",
        "eager / fused",
        "p20 to p80",
        "GFLOP/s",
        "eager MiB",
        "fused MiB",
    )
    worst = min(rows, key=lambda row: row.ratio.middle)
    last = f"worst block: {worst.name}, eager's time / fused time {worst.ratio.middle:.2f} ({worst.ratio})"
    return f"{table(title, header, cells)}\n{last}"


def _step(block: nn.Module, x: Tensor, task: Task) -> Callable[[], object]:
    def forward() -> Tensor:
        with task.context():
            return block(x)

    if task.mode == "eval":
        return torch.no_grad()(forward)
    dout = torch.ones_like(forward())

    def training() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        torch.autograd.backward(forward(), dout)

    return training


def _saved(block: nn.Module, x: Tensor, task: Task) -> int:
    if task.mode == "eval":
        return 0

    def forward() -> Tensor:
        with task.context():
            return block(x)

    return saved_bytes(forward, block.buffers())


def _traffic(step: Callable[[], object]) -> int:
    with _Bytes() as counted:
        step()
    return counted.bytes


class _Bytes(TorchDispatchMode):
    """Counts the bytes of every operator's operands and results; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            given = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in given)
        return out
