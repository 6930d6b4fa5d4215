"""A child process that answers; what it holds here needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.tools.bench.worker import BenchError, Worker

HELD = """
import os, elsewhere

class Held:
    def __init__(self, start):
        if start < 0:
            raise ValueError("start is negative")
        self.count = start
    def add(self, number):
        self.count += number
        return self.count
    def cores(self):
        return sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"], os.environ.get("OMP_PLACES")
    def where(self):
        return elsewhere.PLACE
    def fail(self):
        raise KeyError("this")
    def die(self):
        os._exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "elsewhere.py").write_text("PLACE = 'the path that was given'")
    return str(tmp_path)


@pytest.fixture
def worker(folder: str) -> Iterator[Any]:
    core = min(os.sched_getaffinity(0))
    worker = Worker(f"{folder}/held.py:Held", (5,), [core], path=[f"{folder}/path"])
    yield worker
    worker.close()


def test_it_answers_and_keeps_its_state(worker: Worker) -> None:
    assert [worker("add", 1), worker("add", 2)] == [6, 8]
    assert worker("where") == "the path that was given"
    core = min(os.sched_getaffinity(0))
    assert worker("cores") == ([core], "1", f"{{{core}}}")


def test_an_error_is_told_and_the_next_call_answered(worker: Worker) -> None:
    with pytest.raises(BenchError, match="KeyError: 'this'"):
        worker("fail")
    assert worker("add", 1) == 6


def test_a_death_is_told(worker: Worker) -> None:
    with pytest.raises(BenchError, match=r"held\.py:Held ended with status 7"):
        worker("die")


def test_what_cannot_be_made_is_told(folder: str) -> None:
    with pytest.raises(BenchError, match="ValueError: start is negative"):
        Worker(f"{folder}/held.py:Held", (-1,), [min(os.sched_getaffinity(0))], path=[f"{folder}/path"])
