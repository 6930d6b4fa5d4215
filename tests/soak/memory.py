"""Steps of training and evaluation without growth: not of one tensor, nor of what malloc has handed out by a leak.

The process itself may grow by what glibc cannot put together again, up to the memory that `csrc/cpu/heap.h` keeps.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fused
from soak.network import batch, network
from soak.outcome import Outcome

IN_USE = 0.25  # MiB; a thousand steps that lose 256 bytes each
RESIDENT = 64.0  # MiB, as csrc/cpu/heap.h
CYCLE = 60  # steps after which `_step` does the same again


def run(seconds: float, seed: int, steps: int = 1000) -> Outcome:
    """At least `steps` steps, in whole cycles behind a first one, and as many as `seconds` allow."""
    outcome, until = Outcome(), time.monotonic() + seconds
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    tensors = in_use = resident = done = 0
    while done < CYCLE + steps or done % CYCLE or time.monotonic() < until:
        _step(net, optimizer, done, seed)
        done += 1
        if done == CYCLE:
            tensors, in_use, resident = _tensors(), _in_use(), _resident()
    outcome.count("steps", done - CYCLE)
    more, leaked, grown = _tensors() - tensors, (_in_use() - in_use) / 2**20, (_resident() - resident) / 2**20
    outcome.figures["tensors more than at the beginning"] = str(more)
    outcome.figures["more in use"] = f"{leaked:.3f} MiB"
    outcome.figures["growth of the process"] = f"{grown:.1f} MiB"
    if more > 0:
        outcome.failures.append(f"{more} tensors more live after {done - CYCLE} steps than before")
    for what, value, accepted in (("memory in use", leaked, IN_USE), ("the process", grown, RESIDENT)):
        if value > accepted:
            outcome.failures.append(f"{what} grew by {value:.2f} MiB in {done - CYCLE} steps; accepted: {accepted}")
    return outcome


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, i: int, seed: int) -> None:
    """Training, in turn with autocast and with less memory; sometimes evaluation, a copy, fusing anew."""
    x = batch(2 + i % 2, 32 + 16 * (i % 2), seed + i)
    resnet_fused.fuse(net, memory="low" if i % 4 == 3 else "default")
    net.train()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
        net(x).float().square().mean().backward()
    optimizer.step()
    if i % 3 == 0:
        net.eval()
        with torch.no_grad():
            net(x)
    if i % 10 == 0:
        copy.deepcopy(net).eval()(x)
        resnet_fused.unfuse(net)


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


class _Mallinfo2(ctypes.Structure):
    """glibc's; uordblks and hblkhd are the bytes that the program holds, in the heaps and mapped."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def _in_use() -> int:
    """Bytes that malloc has handed out and not taken back."""
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo2
    info = ask()
    return info.uordblks + info.hblkhd


def _resident() -> int:
    """Bytes of the process, after glibc has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
