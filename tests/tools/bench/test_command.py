"""``resnet-fused bench`` from end to end in this process, on a tiny network; nothing here asserts a time."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resnet_fused.modules.fuse import fuse
from resnet_fused.tools.bench import contenders
from resnet_fused.tools.cli import main

SMALL = ["bench", "--size", "32", "--batch", "4", "--rounds", "2", "--threads", "1", "--one-process"]


def test_everything_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"), "--plots", str(tmp_path / "plots")]
    peers = ["--peers", "eager", "contiguous", "low-memory", "max-autotune"]
    assert main([*SMALL, *peers, "--mode", "eval", "train", "--dtype", "float32", "autocast", *files]) == 0

    record = json.loads((tmp_path / "a.json").read_text())
    assert {"machine", "extension", "versions", "setting", "ceilings", "runs"} == set(record)
    assert record["setting"]["rounds"] == 2 and len(record["setting"]["cores"]) == 1
    assert record["machine"]["threads"] == "1" and "instructions" in record["machine"]
    assert {row["what"] for row in record["ceilings"]} == {"float32 product", "bfloat16 product", "copy"}
    runs = {(run["mode"], run["dtype"]): run for run in record["runs"]}
    assert len(runs) == 4
    for (mode, _), run in runs.items():
        names = [entry["name"] for entry in run["contenders"]]
        low = ["resnet_fused low memory"] if mode == "train" else []
        assert names == ["resnet_fused", *low, "eager", "eager contiguous"]
        assert run["absent"]["torch.compile max-autotune"] == "runs with --device cuda only"
        for entry in run["contenders"]:
            assert len(entry["seconds"]) == 2 and min(entry["seconds"]) > 0
            assert (entry["time_over_ours"] is None) == (entry["name"] == "resnet_fused")
            assert entry["errors"]["output"] <= run["accepted_errors"]["output"]
            assert (entry["errors"]["gradients"] is None) == (mode == "eval")
            assert (entry["saved_bytes"] is None) == (mode == "eval")
        blocks = {row["name"]: row for row in run["blocks"]}
        assert set(blocks) == {"stem", *(f"layer{i}.0" for i in range(1, 5))}
        for row in blocks.values():
            assert 0 < row["fused"]["bytes"] < row["eager"]["bytes"] and row["flops"] > 0
            assert (row["fused"]["saved"] > 0) == (mode == "train")

    printed = capsys.readouterr().out
    assert "evaluation, float32, batch 4, 32x32" in printed and "training, bfloat16 autocast" in printed
    assert printed.count("worst block: ") == 4 and "copy" in printed

    html = (tmp_path / "a.html").read_text()
    assert not any(link in html for link in ("http", "src=", "href=", "url(", "<script", "@import"))
    assert "prefers-color-scheme: dark" in html and html.count("<svg") == 3 * 4
    plots = {file.name for file in (tmp_path / "plots").iterdir()}
    assert {"bars-eval-float32.svg", "roofline-train-autocast.svg", "memory-train-float32.svg"} < plots
    assert len(plots) == 3 * 4


def test_ceilings_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--ceilings", "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "torch.mm of 64 x 64" in printed and "GFLOP/s" in printed and "GB/s" in printed
    assert json.loads((tmp_path / "a.json").read_text())["runs"] == []


def test_absent_peers_are_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("onnxruntime", "openvino") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    peers = ["--peers", "onnxruntime", "openvino", "fused-graph"]
    assert main([*SMALL, "--dtype", "float32", "bfloat16", *peers]) == 0
    printed = capsys.readouterr().out
    assert "pip install onnxruntime" in printed and "pip install openvino" in printed
    assert "runs --dtype float32 only" in printed and "runs with --device cuda only" in printed


def test_a_failing_peer_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object) -> contenders.Prepared:
        raise OSError("no compiler\nwas found")

    broken = contenders.Contender("broken", "broken", "", fails)
    monkeypatch.setattr(contenders, "CONTENDERS", (*contenders.CONTENDERS, broken))
    assert main([*SMALL, "--dtype", "float32", "--peers", "broken"]) == 0
    assert "failed: no compiler was found" in capsys.readouterr().out


def _doubled(model: nn.Module) -> nn.Module:
    model.fc.weight.data *= 2
    return model


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(model: nn.Module, *given: Any) -> contenders.Prepared:
        return contenders.on_torch(_doubled(model), *given)

    peer = contenders.Contender("wrong", "wrong", "", wrong)
    monkeypatch.setattr(contenders, "CONTENDERS", (*contenders.CONTENDERS, peer))
    assert main([*SMALL, "--dtype", "float32", "--peers", "wrong"]) == 0
    printed = capsys.readouterr().out
    assert "wrong output: relative error" in printed and "p20 to p80" in printed


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_timed_when_ours_is_wrong(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "fuse", lambda model, **kwargs: _doubled(fuse(model, **kwargs)))
    assert main([*SMALL, "--mode", mode, "--dtype", "float32", "bfloat16", "--peers", "eager"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("wrong output: relative error") == 2 and "images/s" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tensorflow"], "unknown peer 'tensorflow'; accepted: all, low-memory, eager"),
        (["--threads", "0"], "--threads 0: accepted is 1 to "),
        (["--rounds", "1"], "accepted: at least 2 rounds"),
        (["--html", "no/such/folder.html"], "--html no/such/folder.html cannot be written"),
        (["--compare", "HEAD"], "accepted are BASE..HEAD, two commits"),
        (["--compare", "a.whl", "b.whl"], "two wheels or folders with a built resnet_fused"),
    ],
)
def test_unusable_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
