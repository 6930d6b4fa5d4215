"""Does the claim hold? `verify` for each model, layout, dtype and mode; one row each, exit status 1 if one is wrong.

python benches/claim.py
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys

import torch

import resnet_fused
from resnet_fused.tools import named_models
from resnet_fused.tools.info import machine
from resnet_fused.tools.pictures import photographs
from resnet_fused.tools.tables import table
from resnet_fused.tools.verification import SEEDS, Report

LAYOUTS = (torch.contiguous_format, torch.channels_last)
HEADER = ("", "tensors", "output", "folded", "buffer", "gradient", "", "linear", "beyond", "worst", "")
NOTE = """Fused error / eager's error against float64, geometric means over tensors and seeds: of outputs, outputs
without autograd, buffers, gradients (inputs' or parameters', the larger) with the factor that twice its standard error
is, and gradients with activations replaced. beyond: tensors with more than the limit times eager's error, less those
with which it is the other way round, in the worst kind. worst: the largest ratio of a tensor with its own bound."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet18", "resnet50", "resnext50_32x4d"])
    parser.add_argument("--size", type=int, default=64, help="of the square pictures")
    parser.add_argument("--batch", type=int, default=4, help="pictures at once")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()

    print("\n".join(f"{key:<14} {value}" for key, value in machine().items()))
    rows, good = [], True
    for name, layout in itertools.product(args.model, LAYOUTS):
        torch.manual_seed(0)
        model = named_models.build(name).to(memory_format=layout)  # type: ignore[call-overload]

        def pictures(seed: int, layout: torch.memory_format = layout) -> torch.Tensor:
            return photographs(args.batch, args.size, seed=seed).contiguous(memory_format=layout)

        named_models.settle_norms(model, pictures(0))
        for dtype, train in itertools.product((None, torch.bfloat16), (True, False)):
            report = resnet_fused.verify(model, pictures, dtype=dtype, train=train, seeds=args.seeds)
            rows.append(row(name, report))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
            good = good and report.ok
    print(table(f"\n{args.batch} x {args.size} x {args.size}, {args.seeds} seeds", HEADER, rows))
    print(NOTE)
    return 0 if good else 1


def row(name: str, report: Report) -> list[str]:
    def mean(linear: bool, *kinds: str) -> list[str]:
        found = [d for d in report.distributions if d.kind in kinds and d.linear is linear]
        worst = max(found, key=lambda d: d.mean, default=None)
        return ["", ""] if worst is None else [f"{worst.mean:.2f}", f"x/: {math.exp(worst.mean_slack):.2f}"]

    gradients = ("input gradient", "parameter gradient")
    return [
        f"{name}, {report.layout}, {report.dtype}, {'training' if report.train else 'evaluation'}",
        str(sum(d.count for d in report.distributions)),
        mean(False, "output")[0],
        mean(False, "output without autograd")[0],
        mean(False, "buffer")[0],
        *mean(False, *gradients),
        mean(True, *gradients)[0],
        f"{100 * max(d.beyond - d.behind for d in report.distributions):.1f} %",
        f"{max(single.ratio for single in report.singles):.2f}",
        "ok" if report.ok else "WRONG",
    ]


if __name__ == "__main__":
    sys.exit(main())
