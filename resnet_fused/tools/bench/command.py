"""``resnet-fused bench``: arguments, what is run for them, files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from resnet_fused.backends import dispatch
from resnet_fused.tools import named_models
from resnet_fused.tools.bench.blocks import blocks_table, measure_blocks
from resnet_fused.tools.bench.ceilings import Ceilings, ceilings
from resnet_fused.tools.bench.compare import compare
from resnet_fused.tools.bench.contenders import CONTENDERS, OURS, chosen
from resnet_fused.tools.bench.measurement import confined, measure
from resnet_fused.tools.bench.page import page
from resnet_fused.tools.bench.plots import plots
from resnet_fused.tools.bench.task import DTYPES, MODES, Task, cores
from resnet_fused.tools.bench.worker import BenchError
from resnet_fused.tools.info import extension, machine
from resnet_fused.tools.terminal import add_json, say

GOOD, WRONG, USAGE = 0, 1, 2
PEERS = [contender for contender in CONTENDERS if contender.name != OURS]
HELP: dict[str, Any] = {
    "help": "time a model fused, beside PyTorch, torch.compile, ONNX Runtime and OpenVINO",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "description": "Time a network fused and its peers in turns, once each has computed what eager float32 computes.\n"
    "Training is forward and backward of the cross entropy, without an optimizer; evaluation the forward without\n"
    "autograd. Ratios are a peer's time over ours in the same round: above 1, ours is faster. Each contender has a\n"
    "process of its own, one works at a time. Exit status 1 if ours, or with --compare a version, is wrong.\n\n"
    "peers:\n" + "\n".join(f"  {peer.key:<13} {peer.name}: {peer.about}" for peer in PEERS),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments, and `run`."""
    add = parser.add_argument
    named_models.add_option(parser)
    add("--mode", nargs="+", choices=MODES, default=["eval"], help="default: eval")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"], help="default: float32 bfloat16")
    add("--batch", type=int, default=16, help="pictures at once (default: %(default)s)")
    add("--size", type=int, default=224, help="of the square pictures (default: %(default)s)")
    add("--images", metavar="DIR", help="your pictures (default: noise)")
    add("--rounds", type=int, default=9, help="timed, after one that is not (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="each on a core of its own (default: all this process may use)")
    add("--no-pin", dest="pin", action="store_false", help="leave threads to the scheduler: on a machine that is busy")
    add("--peers", nargs="+", default=["all"], metavar="PEER", help="all, or those below (default: all)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--backend", choices=dispatch.NAMES, default="auto", help="of the fused model (default: auto)")
    add("--one-process", action="store_true", help="no processes of their own, but for runtimes that disturb PyTorch's")
    add("--blocks", action="store_true", help="time each block, too; --html and --plots do")
    add("--ceilings", action="store_true", help="measure only what products and copies reach on this machine")
    add(
        "--compare",
        nargs="+",
        metavar="VERSION",
        help="BASE..HEAD, or two wheels or folders: are both right, and which is faster",
    )
    add_json(parser, "machine, setting and every round")
    add("--html", type=Path, metavar="FILE", help="write one page with tables and plots, which needs no network")
    add("--plots", type=Path, metavar="DIR", help="write the plots there, as SVG")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises ValueError for arguments that cannot be used."""
    used = cores(arguments.threads)
    try:
        with confined(used):  # by now, so that the machine is described as it is used
            about = {
                "machine": machine(),
                "extension": extension(),
                "versions": _versions(),
                "setting": {key: value for key, value in vars(arguments).items() if key != "run"} | {"cores": used},
            }
        print(", ".join(f"{key} {value}" for key, value in (about["machine"] | about["versions"]).items()))
        print(f"{len(used)} threads, on cores {', '.join(map(str, used))}")
        return _compare(arguments, used, about) if arguments.compare else _measure(arguments, used, about)
    except BenchError as error:
        print(f"resnet-fused bench: {error}", file=sys.stderr)
        return USAGE


def _measure(arguments: argparse.Namespace, used: list[int], about: dict[str, Any]) -> int:
    contenders = chosen(arguments.peers)
    plotted = arguments.html is not None or arguments.plots is not None
    record: dict[str, Any] = about | {"ceilings": [], "runs": []}
    if arguments.ceilings or plotted:
        _progress("ceilings")
        with confined(used):
            found: Ceilings = ceilings(arguments.device)
            _progress("")
            say(found.table())
        record["ceilings"] = found.to_dict()
        _write(arguments, record)
    right = True
    for task in [] if arguments.ceilings else _tasks(arguments, used):
        table = measure(task, contenders, used, arguments.rounds, arguments.one_process, arguments.pin, _progress)
        _progress("")
        say(f"\n{table.table()}")
        right = right and OURS not in table.absent
        blocks = []
        if (arguments.blocks or plotted) and OURS not in table.absent:
            with confined(used):
                blocks = measure_blocks(task, arguments.rounds, _progress)
            _progress("")
            if blocks:
                say(f"\n{blocks_table(f'Blocks: {task.title}', blocks)}")
        record["runs"].append(table.to_dict() | {"blocks": [row.to_dict() for row in blocks]})
        _write(arguments, record)  # what is done is kept if the next fails
    return GOOD if right else WRONG


def _compare(arguments: argparse.Namespace, used: list[int], about: dict[str, Any]) -> int:
    tasks = _tasks(arguments, used)
    comparison = compare(arguments.compare, tasks, used, arguments.rounds, arguments.pin, _progress)
    _progress("")
    say(str(comparison))
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps(about | {"comparison": comparison.to_dict()}, indent=1, default=str) + "\n"
        )
    return GOOD if comparison.ok else WRONG


def _tasks(arguments: argparse.Namespace, used: Sequence[int]) -> list[Task]:
    if arguments.rounds < 2 or arguments.batch < 1 or arguments.size < 32:
        raise ValueError(
            f"got --rounds {arguments.rounds} --batch {arguments.batch} --size {arguments.size}; accepted: at least 2 "
            "rounds, 1 picture, of 32 pixels"
        )
    task = Task(
        model=arguments.model,
        batch=arguments.batch,
        size=arguments.size,
        threads=len(used),
        device=arguments.device,
        backend=arguments.backend,
        images=arguments.images,
    )
    return [replace(task, mode=mode, dtype=dtype) for mode in arguments.mode for dtype in arguments.dtype]


def _write(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    if arguments.html is not None:
        arguments.html.write_text(page(record))
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, svg in plots(record).items():
            (arguments.plots / f"{name}.svg").write_text(svg)


def _versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    found = {}
    for package in sorted({name for contender in CONTENDERS for name in contender.needs}):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _progress(what: str) -> None:
    """What runs now, on one line of the terminal that the next call replaces."""
    if sys.stderr.isatty():
        print(f"\r{what:<60}\r", end="", file=sys.stderr, flush=True)
