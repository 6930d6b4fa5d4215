"""benches/gpu.py on the CPU: its dry run, and what it does when time runs out or a contestant fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
from gpu_bench.budget import Budget
from gpu_bench.clock import Sample
from gpu_bench.contestants import BENCHMARKED, FUSED, GRAPHED, NETWORKS, PASS, PEER
from gpu_bench.pass_shape import PassShape
from gpu_bench.plan import plan
from gpu_bench.report import best_rows
from gpu_bench.rounds import Bench
from gpu_bench.setting import DIRECTIONS, NETWORK, Setting
from gpu_bench.summary import summarize

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benches" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(out: Path, *arguments: str) -> tuple[str, dict[str, Any], str]:
    """(what it printed, the record, the table)"""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "cpu-dry-run.json").read_text()), (out / "cpu-dry-run.md").read_text()


def test_dry_run_times_every_contestant(tmp_path: Path) -> None:
    _, record, table = dry_run(tmp_path, "--minutes", "5", "--max-autotune")
    assert record["errors"] == [] and record["dropped"] == []
    seen = {(g["block"] == NETWORK, g["direction"], name) for g in record["groups"] for name in g["contestants"]}
    both = {PEER, BENCHMARKED, "torch.compile", "torch.compile, max-autotune"}
    blocks = {(False, direction, name) for direction in DIRECTIONS for name in both | {*FUSED, PASS}}
    networks = {(True, d, name) for d in ("training", "evaluation") for name in both | set(NETWORKS)}
    assert seen == blocks | networks | {(True, "evaluation", name) for name in GRAPHED}
    for group in record["groups"]:
        for name, figures in group["contestants"].items():
            assert len(figures["device_ratio"]) == len(figures["call_ratio"]) == 3
            assert figures["kernels"] is not None
            assert name in table


def test_what_finds_no_time_is_named(tmp_path: Path) -> None:
    printed, record, table = dry_run(tmp_path, "--minutes", "0")
    assert record["groups"] == [] and len(record["dropped"]) == 17
    assert "torch.compile" in table and "17 groups dropped" in printed


class Desk:
    """Answers as gpu_bench.desk.Desk does; contestants of this name fail at this request."""

    def __init__(self, name: str, request: str) -> None:
        self.failing, self.asked = (request, name), 0

    def __call__(self, request: str, *arguments: Any) -> Any:
        contestant = arguments[1] if request == "open" else "".join(arguments)
        self.asked += (request, contestant) == self.failing
        if (request, contestant) == self.failing and (request != "sample" or self.asked == 2):
            raise RuntimeError("out of luck")
        return {"sample": Sample(1.0, 2.0), "launches": (9, 1)}.get(request)


@pytest.mark.parametrize("request_", ["open", "warm", "sample", "launches"])
def test_a_failing_contestant_is_noted_and_the_rest_goes_on(request_: str) -> None:
    desk = Desk("triton single", request_)
    setting = Setting("cpu", False, (2,), 6)
    found = Bench(setting, Budget(1), 0.0, desk, desk)
    found.run(("tiny", 2), "training", ["triton single", "triton phased"], "launches")
    (group,) = found.groups
    kept = {"eager", "triton phased"} | ({"triton single"} if request_ == "launches" else set())
    assert set(group["contestants"]) == kept
    assert all(len(f["samples"]) == 5 for f in group["contestants"].values())
    (error,) = found.errors
    assert "tiny, batch 2, training, triton single: RuntimeError: out of luck" in error


def test_percentiles_and_ratios() -> None:
    samples = {"eager": [2.0, 4.0, 6.0], "triton single": [1.0, 1.0, 2.0]}
    contestants = {n: {"samples": [{"device": t, "call": 10 * t} for t in each]} for n, each in samples.items()}
    group = {"block": "tiny", "batch": 2, "direction": "forward", "contestants": contestants}
    cost = {"flops": 3e12, "fused_bytes": 2e9, "eager_bytes": 4e9, "floor": 0.5}
    summarize(group, lambda *_: cost)
    ours = contestants["triton single"]
    assert ours["device_ratio"][1] == 3 and ours["device_ratio"][0] == pytest.approx(2.4)
    assert (ours["tflops"], ours["gbytes"], ours["of_floor"]) == pytest.approx((3.0, 2.0, 0.5))
    assert contestants["eager"]["call_ratio"] == (1.0, 1.0, 1.0)


def test_passes_are_held_against_a_copy() -> None:
    shape = PassShape(8, (2, 4), True)
    values = 3 * 8 * 2 * 4
    assert shape.bytes("evaluation", 3) == 3 * 2 * values, "reads x and the residual, writes the output"
    assert shape.bytes("forward", 3) == 4 * 2 * values + values / 8
    assert shape.bytes("training", 3) == (4 + 6) * 2 * values + 3 * values / 8
    contestants = {
        n: {"samples": [{"device": t, "call": t}] * 3, "kernels": None} for n, t in ((PEER, 2.0), (PASS, 0.5))
    }
    group = {"block": str(shape), "batch": 3, "direction": "evaluation", "contestants": contestants}
    summarize(group, lambda *_: {"pass_bytes": 1e9, "bandwidth": 4e9})
    ours = contestants[PASS]
    assert (ours["gbytes"], ours["of_copy"], ours["device_ratio"][1]) == pytest.approx((2.0, 0.5, 4.0))
    assert "of_copy" not in contestants[PEER]


def test_the_best_of_ours_beside_torch_compile() -> None:
    def group(**ratios: float) -> dict[str, Any]:
        figures = {n.replace("_", " "): {"device_ratio": (r,) * 3, "call_ratio": (r,) * 3} for n, r in ratios.items()}
        return {"block": "tiny", "batch": 2, "direction": "training", "contestants": figures}

    compiled = {**group(), "contestants": {"torch.compile": {"device_ratio": (1.2,) * 3, "call_ratio": (1.1,) * 3}}}
    (row,) = best_rows([group(native_single=1.5, triton_hybrid=1.75, eager=1.0), compiled])
    assert row[:4] == ["tiny", "2", "training", "triton hybrid"]
    assert [cell[:4] for cell in row[4:]] == ["1.75", "1.20", "1.75", "1.10"]
    assert best_rows([group(native_single=1.5)]) == []


def test_backends_that_cannot_run_are_left_out() -> None:
    setting = Setting("cuda", False, (32,), 224, ("triton",))
    assert setting.fused() == ["triton single", "triton phased", "triton hybrid"]
    assert setting.networks() == ["fused auto", "fused triton"] and setting.passes() == {}
    assert all("native" not in name for *_, contestants in plan(setting, True) for name in contestants)


def test_dry_run_needs_no_gpu_and_the_rest_says_it_does(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.triton_kernels, "why_not", lambda *_: "no GPU here")
    monkeypatch.setattr(script.native, "why_not_on_gpu", lambda *_: "nor for these")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert script.main() == 2
