"""Training in two processes of one thread each (DistributedDataParallel, gloo) beside one process of two threads.

python benches/processes.py --json processes.json

A step of ResNet-50 under bfloat16 autocast on the same pictures: forward, backward, exchange of gradients, SGD. Each of
the two processes has half of the batch and a core to itself, as a process per NUMA node would. All take turns; before
that the gradients of the two processes are compared with those of both halves, one after the other, in one.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fused import models
from resnet_fused.tools.bench.rounds import Spread, interleaved, ratios, timed
from resnet_fused.tools.info import extension, machine
from resnet_fused.tools.pictures import photographs
from resnet_fused.tools.tables import table

PROCESSES = 2
WAYS = ("fused", "eager")


class Setting(NamedTuple):
    model: str
    batch: int  # of all processes together
    size: int


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=16, help="of both processes together")
    parser.add_argument("--size", type=int, default=224, help="of the square pictures")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine there")
    args = parser.parse_args(argv)
    if args.batch % PROCESSES:
        parser.error(f"--batch must be a multiple of {PROCESSES}, got {args.batch}")

    setting = Setting(args.model, args.batch, args.size)
    torch.set_num_threads(PROCESSES)
    with Pair(setting, args.ways) as pair:
        differences = {way: difference(pair.gradients(way), expected(setting, way)) for way in args.ways}
        turns = {}
        for way in args.ways:
            alone = Training(setting, way)
            turns[f"{way}, one process"] = timed(alone.step)
            turns[f"{way}, two processes"] = timed(functools.partial(pair.step, way))
            turns[f"{way}, two processes, not exchanging"] = timed(functools.partial(pair.step, way, exchange=False))
        seconds = interleaved(turns, args.rounds)
    record = {
        "machine": machine(),
        "extension": extension(),
        "setting": setting._asdict(),
        "largest_difference_of_gradients": differences,
        "seconds": seconds,
        "ratios": {name: spread.to_dict() for name, spread in beside_one(seconds).items()},
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    rows = [[name, f"{spread.middle:.2f} ({spread})"] for name, spread in beside_one(seconds).items()]
    print(table("A step's time over that of one process of two threads", ("", "ratio (p20 to p80)"), rows))
    print(f"largest difference of a gradient from that of one process: {differences}")
    return record


def beside_one(seconds: dict[str, list[float]]) -> dict[str, Spread]:
    return {
        name: ratios(each, seconds[f"{name.split(',')[0]}, one process"])
        for name, each in seconds.items()
        if not name.endswith("one process")
    }


# --- one process -----------------------------------------------------------------------------------------------------


class Training:
    """A model with its optimizer and a batch: the rank-th of so many parts."""

    def __init__(self, setting: Setting, way: str, rank: int = 0, parts: int = 1) -> None:
        torch.manual_seed(0)
        model = getattr(models, setting.model)(fused=way == "fused")
        self.model: nn.Module = model.to(memory_format=torch.channels_last)
        self.x = (
            photographs(setting.batch, setting.size).chunk(parts)[rank].contiguous(memory_format=torch.channels_last)
        )
        self.labels = (torch.arange(setting.batch) % 1000).chunk(parts)[rank]
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(self.model(self.x), self.labels)
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        self.backward()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def expected(setting: Setting, way: str) -> list[Tensor]:
    """The mean of the gradients of both halves, each on one thread; every half is normalised on its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    halves = [Training(setting, way, rank, PROCESSES).gradients() for rank in range(PROCESSES)]
    torch.set_num_threads(threads)
    return [sum(pair) / PROCESSES for pair in zip(*halves, strict=True)]  # type: ignore[misc]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, in parts of the gradient's largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


# --- two processes ---------------------------------------------------------------------------------------------------


class Pair(AbstractContextManager["Pair"]):
    """Two processes that wait for an order and answer when they have carried it out."""

    def __init__(self, setting: Setting, ways: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ends: list[Connection] = []
        self.processes = []
        for rank in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, port, setting, tuple(ways)), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process is the end of its pipe
            self.ends.append(ours)
            self.processes.append(process)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join(30)

    def step(self, way: str, exchange: bool = True) -> None:
        self._ask(("step", way, exchange))

    def gradients(self, way: str) -> list[Tensor]:
        """Of the first process; all have the same."""
        arrays = self._ask(("gradients", way, True))[0]
        return [torch.from_numpy(array) for array in arrays]

    def _ask(self, order: tuple[str, str, bool]) -> list[Any]:
        for end in self.ends:
            end.send(order)
        return [end.recv() for end in self.ends]


def serve(orders: Connection, rank: int, port: int, setting: Setting, ways: Sequence[str]) -> None:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) >= PROCESSES:
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    trainings = {way: Training(setting, way, rank, PROCESSES) for way in ways}
    for training in trainings.values():
        training.model = DistributedDataParallel(training.model)
    while True:
        try:
            what, way, exchange = orders.recv()
        except EOFError:
            break
        training = trainings[way]
        if what == "gradients":
            arrays = [gradient.numpy() for gradient in training.gradients()]
            orders.send(arrays if rank == 0 else None)
        elif exchange:
            training.step()
            orders.send(None)
        else:
            with training.model.no_sync():
                training.step()
            orders.send(None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
