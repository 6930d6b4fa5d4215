"""Eight threads call one module at the same time and get what one thread gets, to the last bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from soak.network import Bits, batch, differing, network
from soak.outcome import Outcome

THREADS = 8
Call = Callable[[nn.Module, Tensor], Bits]


def run(seconds: float, seed: int) -> Outcome:
    outcome, until = Outcome(), time.monotonic() + seconds
    with ThreadPoolExecutor(THREADS) as pool:
        while not outcome.counts or time.monotonic() < until:
            for name, mode, call in (
                ("evaluation", False, _evaluate),
                ("evaluation with gradients", False, _differentiate),
                ("training", True, _differentiate),
            ):
                _together(pool, name, mode, call, seed, outcome)
            seed += THREADS
    return outcome


def _together(pool: ThreadPoolExecutor, name: str, mode: bool, call: Call, seed: int, outcome: Outcome) -> None:
    """A fresh module, so that all threads meet where it describes itself and packs its weights."""
    inputs = [batch(2 + i % 2, 32 + 16 * (i % 3), seed + i) for i in range(THREADS)]
    alone = network().train(mode)
    expected = [call(alone, x) for x in inputs]
    shared = network().train(mode)
    for _ in range(3):
        for got, wanted in zip(pool.map(lambda x: call(shared, x), inputs), expected, strict=True):
            outcome.count(f"calls in {name}")
            if wrong := differing(got, wanted):
                outcome.failures.append(f"{name}: {wrong} tensors differ from one thread's, seed {seed}")


def _evaluate(net: nn.Module, x: Tensor) -> Bits:
    with torch.no_grad():
        return [net(x)]


def _differentiate(net: nn.Module, x: Tensor) -> Bits:
    """Without `.grad`, which the threads would share."""
    out = net(x)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), list(net.parameters()))]
