"""The command prints every part and draws its figures; what the numbers have to be is held by the other tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from resnet_fused.flows import measure


def test_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the command draws")
    measure.main(["orders", "stiff", "memory", "--pictures", str(tmp_path)])
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["flow_orders.png", "implicit_memory.png", "implicit_stiff.png"]
    printed = capsys.readouterr().out
    for words in (
        "crank_nicolson",
        "backward Euler: ",
        "implicit, tensors",
        *(f"drawn: {tmp_path / d}" for d in drawn),
    ):
        assert words in printed


def test_counts_calls(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_microseconds", lambda fn, runs=1: float(fn().numel()))  # no timing in a test
    measure.main(["calls"])
    printed = capsys.readouterr().out
    assert "step(x, dt), a new dt" in printed and "PyTorch: x + dt * net(x)" in printed


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure.main(["order"])
    assert "unknown order; accepted: orders, stiff, memory, calls" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install resnet_fused\[pictures\]"):
        measure.main(["stiff", "--pictures", str(tmp_path)])
