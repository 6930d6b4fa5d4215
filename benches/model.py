"""A whole network, eager against fused (and torch.compile), in interleaved rounds.

python benches/model.py --rounds 9 --json resnet50.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from resnet_fused import backends
from resnet_fused.tools import benchmark, named_models
from resnet_fused.tools.info import extension, machine
from resnet_fused.tools.pictures import photographs

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
MODES = {"training": True, "evaluation": False}


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    torch.manual_seed(0)
    model = named_models.build(args.model).to(args.device, memory_format=layout)
    x = photographs(args.batch, args.size, args.images).to(args.device).contiguous(memory_format=layout)
    labels = torch.arange(args.batch, device=args.device) % 1000
    named_models.settle_norms(model, x)
    print(f"{args.model}, batch {args.batch}, {args.size}x{args.size}, {str(layout).removeprefix('torch.')}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"backends: {backends()}")

    runs = []
    for dtype in args.dtypes:
        for mode in args.modes:
            models = benchmark.contestants(model, backend=args.backend, compiled=args.compile)
            if not MODES[mode]:
                del models["fused, low memory"]  # memory concerns training only
            found = benchmark.measure(
                models, x, labels, train=MODES[mode], dtype=DTYPES[dtype], rounds=args.rounds, progress=_progress
            )
            _progress("")
            print(benchmark.results(f"{mode}, {dtype}{' autocast' if DTYPES[dtype] else ''}", found))
            runs.append({"mode": mode, "dtype": dtype, "measurements": [asdict(m) for m in found]})
    if args.json:
        setting = {key: str(value) for key, value in vars(args).items()}
        record = {"machine": machine(), "extension": extension(), "setting": setting, "runs": runs}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time a network eager and fused, in turns. Training is forward and backward of the cross entropy; "
        "evaluation is the forward without autograd. Printed are images per second, the ratio of eager's time to each "
        "contestant's in the same round (median, 20th and 80th percentile) and the memory that autograd saves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="resnet50", help="a ResNet's name, or timm:NAME")
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--size", type=int, default=224, help="of the square images")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one of warm-up")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16 is autocast's")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what to time")
    parser.add_argument("--backend", default="auto", help="of the fused model; see `resnet-fused info`")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too (compiles for minutes)")
    parser.add_argument("--contiguous", action="store_true", help="NCHW memory instead of channels_last")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of pictures (default: scikit-learn's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round and the machine there")
    return parser.parse_args()


def _progress(what: str) -> None:
    """What runs now, on one line of the terminal that the next call replaces."""
    if sys.stderr.isatty():
        print(f"\r{what:<40}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
