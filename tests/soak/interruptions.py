"""A step that Ctrl-C or the lack of memory ends in its middle: an exception, and afterwards all works as before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from soak.network import Bits, batch, differing, network, step
from soak.outcome import Outcome


def run(seconds: float, seed: int) -> Outcome:
    outcome, until, draw = Outcome(), time.monotonic() + seconds, random.Random(seed)
    net, x = network(), batch(4, 96)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    started = time.monotonic()
    wanted = _all(net, state, x)
    wanted = _all(net, state, x)
    duration = (time.monotonic() - started) / 2
    while not outcome.counts or time.monotonic() < until:
        for name, disturbed in (
            ("Ctrl-C", interrupted(draw.uniform(0, duration))),
            ("out of memory", starved(int(2 ** draw.uniform(10, 25)))),
        ):
            outcome.count(f"steps with {name}")
            try:
                with disturbed:
                    _all(net, state, x)
            except (Exception, KeyboardInterrupt) as error:
                outcome.count(f"ended by {type(error).__name__}")
            if wrong := differing(_all(net, state, x), wanted):
                outcome.failures.append(f"{wrong} tensors differ after {name}, seed {seed}")
    return outcome


def _all(net: nn.Module, state: dict[str, Tensor], x: Tensor) -> Bits:
    """From the same state: evaluation, which packs weights, and a step of training."""
    net.load_state_dict(state)
    with torch.no_grad():
        out = net.eval()(x)
    return [out, *step(net.train(), x)]


@contextlib.contextmanager
def interrupted(after: float) -> Iterator[None]:
    """KeyboardInterrupt `after` that many seconds, if the body still runs then."""

    def raise_it(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, max(after, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def starved(spare: int) -> Iterator[None]:
    """The process can have `spare` bytes more than it has."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, hard))
