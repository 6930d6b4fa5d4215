"""Each trial of ``make soak``, for a moment; and that it sees what it looks for."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from soak import interruptions, memory, network, specs, threads, workers

BRIEF = 0.1  # seconds: each trial does everything once


def test_memory_does_not_grow() -> None:
    outcome = memory.run(BRIEF, seed=0, steps=60)
    assert outcome.failures == [] and outcome.counts["steps"] >= 60


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[torch.Tensor] = []
    honest = memory.batch
    monkeypatch.setattr(memory, "batch", lambda *given: lost.append(x := honest(*given)) or x)
    assert "tensors more live" in memory.run(BRIEF, seed=0, steps=60).failures[0]


def test_threads() -> None:
    outcome = threads.run(BRIEF, seed=0)
    assert outcome.failures == [] and len(outcome.counts) == 3


def test_threads_that_disturb_one_another_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call adds to the next one's result."""
    calls = itertools.count()

    def network_with_memory() -> nn.Module:
        net = network.network()
        net.register_forward_hook(lambda module, given, out: out + next(calls))
        return net

    monkeypatch.setattr(threads, "network", network_with_memory)
    assert threads.run(BRIEF, seed=0).failures


def test_workers() -> None:
    outcome = workers.run(BRIEF, seed=0)
    assert outcome.failures == [] and len(outcome.counts) == 4


def test_interruptions() -> None:
    outcome = interruptions.run(1.0, seed=0)
    assert outcome.failures == [] and outcome.counts["steps with out of memory"] > 0


def test_a_statistic_lost_on_the_way_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that keeps something of the step that was interrupted."""

    def network_with_memory() -> nn.Module:
        net = network.network()
        net.calls = 0

        def forgetful(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            module.calls += 1
            if module.calls == 6:
                raise KeyboardInterrupt
            if module.calls > 6:
                module.fc.weight.data.mul_(1.001)

        net.register_forward_pre_hook(forgetful)
        return net

    monkeypatch.setattr(interruptions, "network", network_with_memory)
    assert interruptions.run(BRIEF, seed=0).failures


def test_other_blocks_each_time() -> None:
    test = str(Path(__file__).parents[1] / "ops" / "test_operators.py::test_encoding_round_trip")
    outcome = specs.run(BRIEF, 1, test)
    assert outcome.failures == [] and outcome.counts["examples"] >= 300


def test_a_trial_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "soak", "--only", "threads", "--minutes", "0.001", "--seed", "0"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert json.loads(told.stdout)["failures"] == []
