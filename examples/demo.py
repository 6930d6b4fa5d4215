"""ResNet-50 on photographs, eager and fused side by side: errors, losses, speed, memory.

python examples/demo.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused.tools import named_models
from resnet_fused.tools.bench.contenders import chosen
from resnet_fused.tools.bench.measurement import measure
from resnet_fused.tools.bench.task import MODES, Task, cores
from resnet_fused.tools.info import machine
from resnet_fused.tools.pictures import photographs
from resnet_fused.tools.tables import table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a ResNet's name, or timm:NAME")
    parser.add_argument("--size", type=int, default=224, help="of the square pictures that are timed")
    parser.add_argument("--batch", type=int, default=4, help="pictures at once")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    args = parser.parse_args()

    start = time.perf_counter()
    torch.manual_seed(0)
    model = named_models.build(args.model).to(memory_format=torch.channels_last)
    print(f"{type(model).__module__}.{type(model).__qualname__} as {args.model}")
    print("\n".join(f"{key:<14} {value}" for key, value in machine().items()))
    for name, reason in resnet_fused.backends().items():
        print(f"{'backend':<14} {name}: {reason or 'available'}")
    if not fused_backends():
        print("NO FUSED BACKEND RUNS HERE: below, 'fused' is plain PyTorch, too.")

    small = photographs(args.batch, min(args.size, 64))
    named_models.settle_norms(model, small)
    equal = equivalence(model, small[:4])
    # a fresh deep network amplifies rounding until its losses are noise; with branches that start at zero it trains
    trainable = named_models.build(args.model, zero_init_residual=True).to(memory_format=torch.channels_last)
    losses(trainable, small)
    speed(args.model, args.batch, args.size, args.rounds)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0 if equal else 1


def fused_backends() -> list[str]:
    return [name for name, reason in resnet_fused.backends().items() if reason is None and name != "eager"]


def equivalence(model: nn.Module, x: Tensor) -> bool:
    """Both against float64; True if the fused errors keep their bounds (README, The claim)."""
    rows, equal = [], True
    for dtype, train in ((None, True), (None, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        report = resnet_fused.verify(model, x, dtype=dtype, train=train, seeds=2, progress=lambda what, *_: _note(what))
        worst = max(report.singles, key=lambda single: single.ratio / single.limit)
        rows.append(
            [
                f"{'training' if train else 'evaluation'}, {report.dtype}",
                str(sum(each.count for each in report.distributions)),
                f"{max(each.mean for each in report.distributions if each.kind == 'output'):.2f}",
                f"{worst.part}: {worst}",
                f"{worst.fused_error:.1e}",
                f"{worst.eager_error:.1e}",
                f"{worst.ratio:.2f}",
                "ok" if report.ok else "WRONG",
            ]
        )
        equal = equal and report.ok
    _note("")
    header = ("", "compared", "outputs' mean ratio", "worst single", "fused error", "eager error", "ratio", "")
    title = "\nErrors against float64: outputs, gradients and running statistics of every block and of the model"
    print(table(title, header, rows))
    return equal


def losses(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    """The same training three times: which of the two photographs is a crop from?"""
    labels = torch.arange(len(x)) % 2  # `photographs` takes them in turn
    eager = _train(copy.deepcopy(model), x, labels, steps)
    fused = _train(resnet_fused.fuse(copy.deepcopy(model)), x, labels, steps)
    exact = _train(copy.deepcopy(model).double(), x.double(), labels, steps)
    rows = [
        [str(step + 1), f"{eager[step]:.6f}", f"{fused[step]:.6f}", f"{exact[step]:.6f}"]
        + [f"{abs(loss - exact[step]):.1e}" for loss in (eager[step], fused[step])]
        for step in range(steps)
    ]
    header = ("step", "eager loss", "fused loss", "in float64", "eager off by", "fused off by")
    print(table("\nTraining with SGD, float32", header, rows))


def _train(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(loss.item())
    return found


def speed(model: str, batch: int, size: int, rounds: int) -> None:
    """Images per second, and the memory saved for backward; `resnet-fused bench` has more peers."""
    used = cores()
    for dtype in ("float32", "autocast"):
        for mode in MODES:
            task = Task(model, mode, dtype, batch, size, len(used))  # type: ignore[arg-type]
            peers = ["eager", "low-memory"] if mode == "train" else ["eager"]
            run = measure(task, chosen(peers), used, rounds, one_process=True, progress=_note)
            _note("")
            print(f"\n{run.table()}", flush=True)


def _note(what: str) -> None:
    """What runs now, on one line of the terminal that the next note replaces."""
    if sys.stderr.isatty():
        print(f"\r{what:<40}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
