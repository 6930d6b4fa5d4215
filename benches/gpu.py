"""ResNet-50 on a GPU: each kind of block, the whole network and passes alone, every way to run them, in turns.

    python benches/gpu.py --minutes 5
    python benches/gpu.py --dry-run  # the same paths on the CPU, in Triton's interpreter: tiny, says nothing of speed

Two times per call. "device": its launches queue behind a wait, so that the GPU's work alone counts. "call": from an
idle GPU until it is idle again, as a caller sees it; for small batches that is mostly Python and launches. Every ratio
is eager's time over the contestant's within the same round. README.md beside this file tells how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench.budget import Budget
from gpu_bench.costs import counted_costs
from gpu_bench.desk import Desk
from gpu_bench.device import described, measured_chip
from gpu_bench.plan import plan
from gpu_bench.precompile import precompile
from gpu_bench.remote import Remote
from gpu_bench.report import markdown
from gpu_bench.rounds import Bench
from gpu_bench.setting import Setting
from gpu_bench.summary import summarize

from resnet_fused import triton_kernels
from resnet_fused.backends import native
from resnet_fused.tools.info import extension
from resnet_fused.triton_kernels.host import chips


def main() -> int:
    args = _arguments()
    if args.dry_run and not triton_kernels.interpreted():  # Triton looks at this when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    left_out = {} if args.dry_run else _left_out()
    if len(left_out) == 2:
        print(f"{'; '.join(left_out.values())}; --dry-run needs no GPU", file=sys.stderr)
        return 2
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    out = args.out or (Path(tempfile.mkdtemp()) if args.dry_run else Path(__file__).parent / "results")
    out.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # what is tuned here stays here
    budget = Budget(args.minutes)
    backends = tuple(name for name in ("native", "triton") if name not in left_out)
    setting = (
        Setting("cpu", True, (2,), 6) if args.dry_run else Setting("cuda", False, tuple(args.batches), 224, backends)
    )
    compiles = "triton" in backends and not args.dry_run
    compiled = precompile(setting, 60 * args.minutes / 3) if compiles else {"seconds": 0.0}
    local, remote = Desk(setting), Remote(setting)
    chip = chips.INTERPRETER if args.dry_run else chips.of_device(0)
    measured = measured_chip(chip, local.clock, setting.device, args.dry_run)
    bench = Bench(setting, budget, args.seconds, local, remote)
    record: dict[str, Any] = {
        "machine": described(setting.device),
        "extension": extension(),
        "minutes": args.minutes,
        "left_out": list(left_out.values()),
        "precompiled": compiled,
        "measured": {"bandwidth": measured.bandwidth, "half_peak": measured.half_peak},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", record["machine"]["device"].lower()).strip("-")
    costs = counted_costs(setting, chip, measured)
    for tier, key, directions, contestants in plan(setting, args.max_autotune):
        for direction in directions:
            bench.run(key, direction, contestants, tier)
        _write(out / slug, record, bench, costs)
    remote.stop()
    if not args.dry_run:
        print(markdown(record))
    print(f"{out / slug}.json and .md; {len(bench.errors)} failed, {len(bench.dropped)} groups dropped")
    return 1 if bench.errors else 0


def _left_out() -> dict[str, str]:
    """The backends that cannot run here, and why."""
    reasons = {"native": native.why_not_on_gpu(torch.device("cuda")), "triton": triton_kernels.why_not("cuda")}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _write(
    path: Path, record: dict[str, Any], bench: Bench, costs: Callable[[str, int, str], dict[str, float]]
) -> None:
    """After every piece, so that an interrupted run leaves what it has."""
    for group in bench.groups:
        if not all("device_seconds" in f for f in group["contestants"].values()):
            summarize(group, costs)
    record |= {"groups": bench.groups, "errors": bench.errors, "dropped": bench.dropped}
    path.with_name(path.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_name(path.name + ".md").write_text(markdown(record))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="in all; what finds no time is dropped and named")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each group, after warm-up")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile with it, too, after the rest")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: results/ beside this file; a new folder if dry"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, one round")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
