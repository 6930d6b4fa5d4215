"""Blocks with nn.SyncBatchNorm on two processes against one process with the whole batch and ordinary norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equivalence import assert_as_accurate
from support.shared_blocks import WORLD, Shared, compute, results
from torch import Tensor

CALLS = {
    "basic": Shared("basic"),
    "converted after fuse": Shared("basic", (1, 3), converted="after"),
    "bottleneck, projection": Shared("bottleneck with projection", (3, 2)),
    "pre-activation": Shared("pre-activation"),
    "scaled": Shared("scaled"),
    "DistributedDataParallel": Shared("bottleneck with projection", (3, 1), ddp=True),
    "DistributedDataParallel, float64": Shared("basic", (1, 4), dtype=torch.float64, ddp=True),
    "float64": Shared("bottleneck with projection", (1, 3), dtype=torch.float64),
    "bfloat16": Shared("basic", (3, 2), dtype=torch.bfloat16),
    "autocast": Shared("bottleneck with projection", (3, 2), autocast=True),
    "one norm of two": Shared("basic", (3, 1), only="bn2", dtype=torch.float64),
    "gated": Shared("gated", (2, 3)),
    "several calls": Shared("several calls", (3, 2)),
    "several calls, autocast": Shared("several calls", (2, 2), autocast=True),
    "several calls, float64": Shared("several calls", (1, 3), dtype=torch.float64, ddp=True),
    "network": Shared("network", (3, 1), dtype=torch.float64, size=16, ddp=True),
    "network, pre-activation": Shared("network, pre-activation", (1, 3), dtype=torch.float64, size=16, ddp=True),
    "nothing in the second": Shared("bottleneck with projection", (3, 0)),
    "one value each": Shared("basic", (1, 1), size=1, dtype=torch.float64),
    "one value in all": Shared("basic", (1, 0), size=1),
}
REFUSED = "one value in all"
# Pooled, so that one lucky rounding of eager's in a tensor of three values does not set the bar; float64 has its own.
SEEDS = 4
RUNS = [
    (name, seed)
    for name, call in CALLS.items()
    for seed in range(1 if call.dtype == torch.float64 or name == REFUSED else SEEDS)
]
WHOLE = [name for name in CALLS if name not in (REFUSED, "one norm of two")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[dict[str, Any]]]]:
    """What each process got, call after call."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(
        compute, ([replace(CALLS[name], seed=seed) for name, seed in RUNS], str(folder)), nprocs=WORLD
    )
    yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def shares_of(name: str, parts: list[list[dict[str, Any]]], seed: int = 0) -> list[dict[str, Any]]:
    return [part[RUNS.index((name, seed))] for part in parts]


@pytest.mark.parametrize("name", WHOLE)
def test_processes_share_their_batch(name: str, parts: list[list[dict[str, Any]]]) -> None:
    """Outputs and input gradients join, parameter gradients add up (DDP: to their mean), buffers agree everywhere."""
    call = CALLS[name]
    runs = [compared(replace(call, seed=seed), shares_of(name, parts, seed)) for n, seed in RUNS if n == name]
    for result in runs[0]:
        got, eager, exact = (torch.stack(each) for each in zip(*(run[result] for run in runs), strict=True))
        if call.dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)  # rounding, 1e-16, grown by 1/std twice
        else:
            assert_as_accurate(f"{name}, {result}", got, eager, exact)


def compared(call: Shared, shares: list[dict[str, Any]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each result what the processes have together, eager's of one process, and the exact one."""
    everything = slice(None)
    eager = results(call, call.model(), call.pictures(), everything)
    plain = Shared(call.block, call.batches, call.dtype, size=call.size, seed=call.seed)
    exact = results(plain, call.model().double(), call.pictures(torch.float64), everything)
    assert shares[0].keys() - {"explained"} == exact.keys()
    found = {}
    for result, value in exact.items():
        if result in ("out", "evaluated", "grad of x"):
            got = torch.cat([share[result] for share in shares])
        elif result.startswith("grad"):
            got = shares[0][result] * WORLD if call.ddp else shares[0][result] + shares[1][result]
            assert not call.ddp or torch.equal(shares[0][result], shares[1][result]), result
        else:
            assert torch.equal(shares[0][result], shares[1][result]), result
            got = shares[0][result]
        found[result] = got, eager[result], value
    return found


def test_only_the_converted_norm_is_shared(parts: list[list[dict[str, Any]]]) -> None:
    shares = shares_of("one norm of two", parts)
    assert torch.equal(shares[0]["0.bn2.running_mean"], shares[1]["0.bn2.running_mean"])
    assert not torch.equal(shares[0]["0.bn1.running_mean"], shares[1]["0.bn1.running_mean"])


def test_processes_refuse_one_value(parts: list[list[dict[str, Any]]]) -> None:
    """All of them, and without a trace in any buffer."""
    for share in shares_of(REFUSED, parts):
        assert "more than 1 value per channel when training, got 1 over the 2 processes" in share["error"]
        assert share["moved"] == []


@pytest.mark.parametrize("name", ["basic", "bottleneck, projection"])
def test_explain_says_what_runs(name: str, parts: list[list[dict[str, Any]]]) -> None:
    for share in shares_of(name, parts):
        ((backend, reason),) = share["explained"]
        assert backend == "native" and "SyncBatchNorm shares its statistics between processes" in reason
