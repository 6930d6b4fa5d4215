"""Processes forked and spawned from one that has used fused blocks, with several threads, compute what it computes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from soak.network import Bits, batch, differing, network, step
from soak.outcome import Outcome

LIMIT = 120  # seconds until a worker counts as hung


def run(seconds: float, seed: int) -> Outcome:
    outcome, until = Outcome(), time.monotonic() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        while not outcome.counts or time.monotonic() < until:
            for method in ("fork", "spawn"):
                _process(method, seed, outcome)
                _loader(method, seed, outcome)
            seed += 1
    finally:
        torch.set_num_threads(threads)
    return outcome


def _both(net: nn.Module, x: Tensor) -> Bits:
    """Evaluation, then a step of training."""
    with torch.no_grad():
        out = net.eval()(x)
    return [out, *step(net.train(), x)]


def _process(method: str, seed: int, outcome: Outcome) -> None:
    """A module handed to a child after the parent's threads have run it. Both then compute on one thread: how a
    statistic is summed depends on their number."""
    net, x = network(), batch(seed=seed)
    _both(net, x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    context: Any = torch.multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_compute, args=(net, x, sender), daemon=True)
    child.start()
    got = receiver.recv() if receiver.poll(LIMIT) else None
    child.join(LIMIT if got is not None else 0)
    if child.is_alive():
        child.kill()
    outcome.count(f"processes by {method}")
    net.load_state_dict(state)
    torch.set_num_threads(1)
    wanted = _both(net, x)
    torch.set_num_threads(2)
    if got is None or child.exitcode != 0:
        outcome.failures.append(
            f"a process by {method} gave {'nothing' if got is None else 'its results'}, then ended "
            f"with {child.exitcode}"
        )
    elif wrong := differing([torch.from_numpy(value) for value in got], wanted):
        outcome.failures.append(f"a process by {method}: {wrong} tensors differ from the parent's")


def _compute(net: nn.Module, x: Tensor, sender: Any) -> None:
    torch.set_num_threads(1)
    sender.send([value.numpy() for value in _both(net, x)])
    sender.close()


class Features(Dataset[Tensor]):
    """What a fused network makes of pictures, computed where the loader reads them."""

    def __init__(self, net: nn.Module, seed: int) -> None:
        self.net = net.eval().requires_grad_(False)
        self.seed = seed

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return self.net(batch(1, 32, self.seed + i))[0]


def _loader(method: str, seed: int, outcome: Outcome) -> None:
    features = Features(network(), seed)
    alone = [features[i] for i in range(len(features))]
    loader = DataLoader(features, batch_size=1, num_workers=2, multiprocessing_context=method, timeout=LIMIT)
    got = [value[0] for value in loader]
    outcome.count(f"loaders by {method}")
    if wrong := differing(got, alone):
        outcome.failures.append(f"a DataLoader by {method}: {wrong} results differ")
