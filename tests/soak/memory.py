"""Steps of training and evaluation without growth: not of one tensor, nor of the process by what would be a leak."""

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

ALLOWED = 1.0  # MiB; a thousand steps that lose 1 KiB each
CYCLE = 60  # steps after which `_step` does the same again


def run(seconds: float, seed: int, steps: int = 1000) -> Outcome:
    """At least `steps` steps, in whole cycles behind a first one, and as many as `seconds` allow."""
    outcome, until = Outcome(), time.monotonic() + seconds
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    tensors = resident = done = 0
    while done < CYCLE + steps or done % CYCLE or time.monotonic() < until:
        _step(net, optimizer, done, seed)
        done += 1
        if done == CYCLE:
            tensors, resident = _tensors(), _resident()
    outcome.count("steps", done - CYCLE)
    more, grown = _tensors() - tensors, (_resident() - resident) / 2**20
    outcome.figures["tensors more than at the beginning"] = str(more)
    outcome.figures["growth of the process"] = f"{grown:.2f} MiB"
    if more > 0:
        outcome.failures.append(f"{more} tensors more live after {done - CYCLE} steps than before")
    if grown > ALLOWED:
        outcome.failures.append(f"the process grew by {grown:.1f} MiB in {done - CYCLE} steps; accepted: {ALLOWED}")
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


def _resident() -> int:
    """Bytes of the process, after glibc has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
