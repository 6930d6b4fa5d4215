"""What a call of a fused block costs beside its kernels, and a network's evaluation of one small picture.

python benches/overhead.py --json overhead.json

One thread, and processor time, which other processes on the machine lengthen less than they do the time that passes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import fuse
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.ops import operators
from resnet_fused.tools import named_models
from resnet_fused.tools.bench.rounds import interleaved, ratios, timed
from resnet_fused.tools.info import extension, machine
from resnet_fused.tools.tables import table

LAST = torch.channels_last
Step = Callable[[], object]
CALLS = 100  # per round and contestant


@dataclass(frozen=True)
class Kind:
    """How numbers are held: parameters' and input's dtype, and whether autocast narrows them to bfloat16."""

    name: str
    dtype: torch.dtype
    autocast: bool = False

    def context(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


KINDS = (
    Kind("float32", torch.float32),
    Kind("bfloat16", torch.bfloat16),
    Kind("bfloat16 autocast", torch.float32, autocast=True),
)


@dataclass(frozen=True)
class Row:
    """Microseconds of one call, medians over rounds; ratio: fused over eager within a round (p20, median, p80).

    overhead: of the fused call, what is left when the compiled operators answer at once.
    """

    what: str
    eager: float
    fused: float
    overhead: float | None
    ratio: tuple[float, float, float]

    def cells(self) -> list[str]:
        low, middle, high = self.ratio
        left = "" if self.overhead is None else f"{self.overhead:.0f}"
        return [self.what, f"{self.eager:.0f}", f"{self.fused:.0f}", left, f"{middle:.2f} ({low:.2f} to {high:.2f})"]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [block(kind, train, args.channels, args.rounds) for kind in KINDS for train in (False, True)]
    header = ("call", "eager us", "fused us", "overhead us", "fused / eager")
    print(table(f"A bottleneck of {args.channels} channels and one pixel", header, [row.cells() for row in rows]))
    networks = [network(args.model, kind, size, args.rounds) for size in args.sizes for kind in KINDS]
    print(table(f"{args.model}, evaluation, batch 1", header, [row.cells() for row in networks]))
    if args.json:
        record = {"machine": machine(), "extension": extension(), "rows": [asdict(row) for row in rows + networks]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def block(kind: Kind, train: bool, channels: int, rounds: int) -> Row:
    """An identity bottleneck on [1, C, 1, 1]; in training [2, C, 1, 1]: of one value there are no batch statistics."""
    eager = Bottleneck(channels, channels // 4).to(kind.dtype, memory_format=LAST).train(train)  # type: ignore[call-overload]
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(1 + train, channels, 1, 1, dtype=torch.bfloat16 if kind.autocast else kind.dtype)
    x = x.contiguous(memory_format=LAST)
    run = _training if train else _evaluation
    steps = {name: _many(run(module, x), kind) for name, module in {"eager": eager, "fused": fused}.items()}
    alone = _many(run(fused, x), kind)

    def overhead() -> None:
        with _operators_answer_at_once(fused, x, kind, train):
            alone()

    steps["overhead"] = overhead
    what = f"{kind.name}, {'training, forward and backward' if train else 'evaluation'}"
    return _row(what, steps, rounds, CALLS)


def network(name: str, kind: Kind, size: int, rounds: int) -> Row:
    eager = named_models.build(name).eval().to(kind.dtype, memory_format=LAST)  # type: ignore[call-overload]
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(1, 3, size, size, dtype=kind.dtype).contiguous(memory_format=LAST)
    steps = {"eager": _many(_evaluation(eager, x), kind, 1), "fused": _many(_evaluation(fused, x), kind, 1)}
    return _row(f"{size}x{size}, {kind.name}", steps, rounds, 1)


def _evaluation(module: nn.Module, x: Tensor) -> Step:
    return torch.no_grad()(lambda: module(x))


def _training(module: nn.Module, x: Tensor) -> Step:
    leaf, dout = x.clone().requires_grad_(), torch.randn_like(x)

    def step() -> None:
        module.zero_grad()
        leaf.grad = None
        torch.autograd.backward(module(leaf), dout)

    return step


@contextlib.contextmanager
def _operators_answer_at_once(fused: nn.Module, x: Tensor, kind: Kind, train: bool) -> Iterator[None]:
    """The compiled operators replaced by what they returned before, so that all the rest of a call is left."""
    kept: dict[str, object] = {}
    originals = {name: getattr(operators, f"residual_block_{name}") for name in ("forward", "backward", "infer")}

    def keeping(name: str) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            kept[name] = originals[name](*args, **kwargs)
            return kept[name]

        return run

    def answer(name: str) -> Callable[..., object]:
        return lambda *_, **__: kept[name] if name != "forward" else fresh(kept[name])

    def fresh(result: Any) -> object:  # autograd makes its own of what a Function returns
        out, saved, statistics = result
        return out.detach(), saved, [t.detach() for t in statistics]

    try:
        for name in originals:
            setattr(operators, f"residual_block_{name}", keeping(name))
        with kind.context():
            (_training if train else _evaluation)(fused, x)()
        for name in originals:
            setattr(operators, f"residual_block_{name}", answer(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(operators, f"residual_block_{name}", original)


def _many(step: Step, kind: Kind, calls: int = CALLS) -> Step:
    def run() -> None:
        with kind.context():
            for _ in range(calls):
                step()

    return run


def _row(what: str, steps: dict[str, Step], rounds: int, calls: int) -> Row:
    seconds = interleaved({name: timed(step, time.process_time) for name, step in steps.items()}, rounds)
    micro: Callable[[str], float] = lambda name: statistics.median(seconds[name]) / calls * 1e6  # noqa: E731
    overhead = micro("overhead") if "overhead" in steps else None
    return Row(what, micro("eager"), micro("fused"), overhead, ratios(seconds["fused"], seconds["eager"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time single calls of a fused and an eager block whose convolutions are tiny, and of a network of "
        "one picture, in turns, on one thread, in processor time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--channels", type=int, default=64, help="of the bottleneck's input")
    parser.add_argument("--model", default="resnet50", help="a ResNet's name, or timm:NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224], help="of the square picture")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, after one of warm-up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
