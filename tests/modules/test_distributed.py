"""Fused models in DistributedDataParallel, fully_shard and beside them, on two processes, against the unfused model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.distributed_runs import STATES, TRAINED, WORLD, Results, compute
from support.equivalence import assert_as_accurate, root_mean_square_error

RANKS = range(WORLD)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """What each process got."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(compute, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in RANKS]


def assert_same(got: Results, expected: Results) -> None:
    """In fp64: rounding, 1e-16, grown by 1/std in each norm and over the steps."""
    assert expected and got.keys() >= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def without_buffers(results: Results) -> Results:
    return {name: value for name, value in results.items() if "running" not in name}


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "unfused"])
def test_trains_as_the_unfused_model(name: str, runs: list[dict[str, Results]]) -> None:
    """Parameters, and of each process losses and buffers, of which DistributedDataParallel sends the first one's."""
    sends = not name.startswith(("sharded", "replicated"))
    for rank in RANKS:
        expected = runs[rank]["unfused"]
        assert_same(runs[rank][name], expected if sends or rank == 0 else without_buffers(expected))


@pytest.mark.parametrize(
    ("name", "unfused"),
    [
        ("checkpointed", "checkpointed, unfused"),
        ("synchronised, sharded", "synchronised, unfused"),
        ("accumulated", "accumulated, unfused"),
        ("accumulated, sharded", "accumulated, unfused"),
        ("joined", "joined, unfused"),
        ("zero redundancy", "zero redundancy, unfused"),
    ],
)
def test_gives_what_the_unfused_model_gives(name: str, unfused: str, runs: list[dict[str, Results]]) -> None:
    for rank in RANKS:
        assert_same(runs[rank][name], runs[rank][unfused])


def test_shards_are_computed_again_as_the_unfused_model(runs: list[dict[str, Results]]) -> None:
    for rank in RANKS:
        expected = runs[rank]["checkpointed, unfused"]
        got = runs[rank]["checkpointed, sharded"]
        assert_same(got, expected if rank == 0 else without_buffers(expected))


def test_flattened_parameters_train_as_the_unfused_model(runs: list[dict[str, Results]]) -> None:
    for rank in RANKS:
        assert_same(runs[rank]["flattened"], {"losses": runs[rank]["unfused"]["losses"]})


def test_compressed_gradients_are_as_exact(runs: list[dict[str, Results]]) -> None:
    """Sent in float16, of fp64 models: what is left of the parameters' exact step."""

    def step(name: str) -> torch.Tensor:
        return torch.cat([value.flatten() for key, value in runs[0][name].items() if key.endswith(("weight", "bias"))])

    assert_as_accurate("parameters", *map(step, ("compressed", "compressed, unfused", "compressed, exact")))


def test_parameters_in_bfloat16(runs: list[dict[str, Results]]) -> None:
    """fully_shard's mixed precision. The mean square of the errors, since flipped masks decide the largest one."""
    got, eager, exact = (runs[0][name]["gradients"] for name in ("bfloat16", "bfloat16, unfused", "bfloat16, exact"))
    assert root_mean_square_error(got, exact) <= 2 * root_mean_square_error(eager, exact)
    assert root_mean_square_error(eager, exact) < 0.1  # both compute the same thing


def test_evaluation_sees_writes_to_shards(runs: list[dict[str, Results]]) -> None:
    """No version counter shows them: the parameters are gathered into the same tensors again."""
    assert runs[0]["explained"]["gathered"] == [True, False]
    for rank in RANKS:
        results = runs[rank]["written while sharded"]
        outputs = [results["before"]]
        for name in ("conv1.weight", "bn2.bias"):
            assert torch.equal(results[f"after {name}"], results[f"afresh {name}"])
            outputs.append(results[f"after {name}"])
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_explain_knows_shards(runs: list[dict[str, Results]]) -> None:
    told = runs[0]["explained"]
    assert {backend for backend, _ in told["sharded"]} == {"native"}
    blocks = told["sharded"][1:]  # the root, with the stem, stays gathered
    assert all("parameters are sharded (DTensor); fully_shard gathers them" in reason for _, reason in blocks)
    assert told["classes"] == ["FSDPFusedResNet", "FSDPFusedBasicBlock", "FSDPFusedBasicBlock"]
    assert told["unfused"] == told["never fused"]
    assert all(backend == "eager" and "FSDPConv2d" in reason for backend, reason in told["layers"])
    assert all(backend == "auto" and "flattened outside of forward" in reason for backend, reason in told["flattened"])


def test_distributed_parameters_run_unfused(runs: list[dict[str, Results]]) -> None:
    """Those of tensor parallelism, which stay DTensors within forward."""
    told = runs[0]["explained"]
    assert told["distributed"] == [("eager", "a parameter or buffer is a DTensor, which the kernels do not read")]
    assert torch.equal(told["distributed, fused"], told["distributed, unfused"])


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("way", ["loaded into", "given to"])
def test_states_are_the_unfused_models(name: str, way: str, runs: list[dict[str, Results]]) -> None:
    """torch.distributed.checkpoint and whole state dicts, from a sharded fused model; under its own names."""
    for rank in RANKS:
        results = runs[rank]["states"]
        assert results["names"] == results["names of its own"]
        got, saved = results[f"{way} {name}"], results["saved"]
        assert got.keys() == saved.keys()
        for key, value in saved.items():
            if "running" not in key:  # each process has its own, and those of one are saved
                assert torch.equal(got[key], value), key
