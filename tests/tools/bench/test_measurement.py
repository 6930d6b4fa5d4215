"""Contenders in processes of their own, which are played by this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from resnet_fused.tools.bench import measurement
from resnet_fused.tools.bench.contenders import Contender, Prepared, chosen, on_torch
from resnet_fused.tools.bench.desk import open_desk
from resnet_fused.tools.bench.task import Task, cores


class Played:
    """`Worker` without a process."""

    made: list[tuple[str, bool]]

    def __init__(self, what: str, given: Sequence[Any], cores: Sequence[int], pin: bool) -> None:
        assert what == "resnet_fused.tools.bench.desk:open_desk"
        self.desk = open_desk(*given)
        self.made.append((given[0], pin))

    def __call__(self, method: str, *given: Any) -> Any:
        return getattr(self.desk, method)(*given)

    def close(self) -> None:
        self.made.append(("closed", False))


@pytest.mark.parametrize("one_process", [False, True])
def test_each_contender_has_a_process(one_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(*given: Any) -> Prepared:
        return on_torch(*given)

    apart = Contender("engine", "engine", "", engine, apart=True)
    made: list[tuple[str, bool]] = []
    monkeypatch.setattr(Played, "made", made, raising=False)
    monkeypatch.setattr(measurement, "Worker", Played)
    monkeypatch.setattr("resnet_fused.tools.bench.desk.CONTENDERS", (*chosen(["eager"]), apart))
    task = Task(batch=2, size=32, threads=1)
    run = measurement.measure(task, [*chosen(["eager"]), apart], cores(1), 2, one_process)
    assert [entry.name for entry in run.entries] == ["resnet_fused", "eager", "engine"] and run.absent == {}
    alone = ["engine"] if one_process else ["resnet_fused", "eager", "engine"]
    assert made == [(name, name != "engine") for name in alone] + [("closed", False)] * len(alone)
    assert [entry.peak is not None for entry in run.entries] == [not one_process, not one_process, True]
