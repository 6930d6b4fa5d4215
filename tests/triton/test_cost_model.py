"""The cost model's counts against numbers worked out by hand, and the command that prints them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused.tools import tables
from resnet_fused.tools.cli import main

pytest.importorskip("triton")

from resnet_fused.triton_kernels.host.chips import CHIPS
from resnet_fused.triton_kernels.host.launch import Launch
from resnet_fused.triton_kernels.host.policies import Policy
from resnet_fused.triton_kernels.offline import cost_model
from resnet_fused.triton_kernels.offline.cost_model import PhaseCost
from resnet_fused.triton_kernels.offline.resnet50 import DIRECTIONS, BlockShape, plan, resnet50

BF16, BATCH = torch.bfloat16, 8
SHAPES = {shape.name: shape for shape in resnet50()}
IDENTITY, STRIDED, STEM = SHAPES["layer1.1"], SHAPES["layer2.0"], SHAPES["stem"]
PIXELS = BATCH * 56 * 56
UNIT = PIXELS * 64 * 2  # bytes of layer1's 64 channels; its 256 are four
WEIGHTS = {"conv1": 256 * 64 * 2, "conv2": 9 * 64 * 64 * 2, "conv3": 64 * 256 * 2}
FLOPS = {"conv1": 2 * PIXELS * 256 * 64, "conv2": 2 * PIXELS * 9 * 64 * 64, "conv3": 2 * PIXELS * 64 * 256}


def fused(shape: BlockShape, direction: str, chip: str = "h100") -> dict[str, PhaseCost]:
    phases = cost_model.fused(shape, direction, BATCH, BF16, CHIPS[chip])  # type: ignore[arg-type]
    assert len({phase.name for phase in phases}) == len(phases)
    return {phase.name: phase for phase in phases}


def eager(shape: BlockShape, direction: str) -> dict[str, PhaseCost]:
    return {phase.name: phase for phase in cost_model.eager(shape, direction, BATCH, BF16)}  # type: ignore[arg-type]


def test_forward_of_an_identity_block() -> None:
    assert fused(IDENTITY, "forward") == {
        "conv1": PhaseCost("conv1", FLOPS["conv1"], (4 + 1) * UNIT + WEIGHTS["conv1"]),
        "conv2": PhaseCost("conv2", FLOPS["conv2"], (1 + 1) * UNIT + WEIGHTS["conv2"]),
        "conv3": PhaseCost("conv3", FLOPS["conv3"], (1 + 4) * UNIT + WEIGHTS["conv3"]),
        "join": PhaseCost("join", 0, (4 + 4 + 4) * UNIT),  # y, x, out
    }
    assert sum(FLOPS.values()) == 2 * BATCH * 56 * 56 * (256 * 64 + 64 * 64 * 9 + 64 * 256)


def test_evaluation_of_an_identity_block() -> None:
    phases = fused(IDENTITY, "infer")
    assert phases["conv1"].bytes - WEIGHTS["conv1"] == (4 + 1) * UNIT
    chained = phases["conv2 and conv3"]  # y1, x, out; y2 stays on the chip
    assert chained.bytes - WEIGHTS["conv2"] - WEIGHTS["conv3"] == (1 + 4 + 4) * UNIT
    assert chained.flops == FLOPS["conv2"] + FLOPS["conv3"]


def test_backward_of_an_identity_block() -> None:
    phases = fused(IDENTITY, "backward")
    launches: list[Launch] = []
    plan(IDENTITY, "backward", BATCH, BF16, Policy(CHIPS["h100"], "phased", submit=launches.append))
    splits = {launch.names[0]: getattr(launch.arguments[3][0], "splits", 0) for launch in launches}
    assert any(count > 1 for count in splits.values())
    for name, read in {"conv1": 1 + 1 + 4, "conv2": 1 + 1, "conv3": 4 + 4 + 1}.items():  # dz, y of the norm; input
        phase = phases.pop(f"{name}: weight gradient")
        partials = 2 * splits[phase.name] * 2 * WEIGHTS[name] if splits[phase.name] > 1 else 0  # float32, out and in
        assert phase.bytes == read * UNIT + partials + WEIGHTS[name]
        assert phase.flops == phases[f"{name}: data gradient"].flops == FLOPS[name]
    assert {name: phase.bytes for name, phase in phases.items()} == {
        "tables": 0,
        "join": (4 + 4 + 4 + 4) * UNIT,  # dout, out, y3; dz
        "conv3: data gradient": (4 + 4 + 1 + 1) * UNIT + WEIGHTS["conv3"],  # dz, y3, y2; dz2
        "conv2: dy": (1 + 1 + 1) * UNIT,  # dz2, y2; dy2
        "conv2: data gradient": (1 + 1 + 1) * UNIT + WEIGHTS["conv2"],  # dy2, y1; dz1
        "conv1: data gradient": (1 + 1 + 4 + 4) * UNIT + WEIGHTS["conv1"],  # dz1, y1, dz; dx
    }


def test_eager_of_an_identity_block() -> None:
    forward = sum(phase.bytes for phase in eager(IDENTITY, "forward").values()) - sum(WEIGHTS.values())
    assert forward == (12 + 3 * 6 + 2 * 2 + 12 + 8) * UNIT  # convolutions, norms, inner relus, add, relu
    infer = sum(phase.bytes for phase in eager(IDENTITY, "infer").values()) - sum(WEIGHTS.values())
    assert infer == (12 + 2 * 6 + 2 * 2 + 12 + 8) * UNIT
    backward = sum(phase.bytes for phase in eager(IDENTITY, "backward").values()) - 2 * sum(WEIGHTS.values())
    assert backward == (2 * 12 + 5 * 6 + 3 * 2 + 12 + 12) * UNIT  # gradients, norms, inner relus, relu, sum


def test_a_strided_block() -> None:
    """A strided 1x1 convolution reads every fourth pixel, and its data gradient multiplies no more than it does."""
    x, y = PIXELS * 256 * 2, PIXELS // 4 * 512 * 2
    weight = 256 * 512 * 2
    forward, backward = fused(STRIDED, "forward"), fused(STRIDED, "backward")
    assert forward["projection"].bytes == x // 4 + y + weight
    assert forward["projection"].flops == backward["projection: data gradient"].flops == 2 * PIXELS // 4 * 256 * 512
    assert backward["projection: data gradient"].bytes == 2 * y + x + weight  # dz, y; all of dx
    assert backward["join"].bytes == 5 * y  # dout, out, y3, the projection's y; dz
    assert eager(STRIDED, "forward")["projection: convolution"].bytes == x // 4 + y + weight
    assert forward["conv2"].bytes == PIXELS * 128 * 2 + PIXELS // 4 * 128 * 2 + 9 * 128 * 128 * 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_and_eager_multiply_the_same(shape: BlockShape, direction: str) -> None:
    for chip in CHIPS:
        phases, operations = fused(shape, direction, chip).values(), eager(shape, direction).values()
        assert sum(phase.flops for phase in phases) == sum(operation.flops for operation in operations) > 0


def test_the_picture_gets_no_gradient() -> None:
    assert not any("data gradient" in name for name in (*fused(STEM, "backward"), *eager(STEM, "backward")))


def test_floors() -> None:
    bytes_bound, flops_bound = PhaseCost("", 0, 3_350_000), PhaseCost("", 989_000_000, 1)
    assert bytes_bound.floor(CHIPS["h100"], BF16) == pytest.approx(1e-6)
    assert flops_bound.floor(CHIPS["h100"], BF16) == pytest.approx(1e-6)
    both = cost_model.floor([bytes_bound, flops_bound], CHIPS["h100"], BF16)
    assert both == pytest.approx(2e-6)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_better_chip_has_lower_floors(dtype: torch.dtype) -> None:
    """Both chips have the same plan: the same number of multiprocessors."""
    slow, fast = (cost_model.predict(CHIPS[name], BATCH, dtype) for name in ("h100", "h200"))
    assert slow.blocks == fast.blocks
    for block in (*slow.blocks, *slow.network()):
        for side in (block.fused, block.eager):
            assert cost_model.floor(side, fast.chip, dtype) <= cost_model.floor(side, slow.chip, dtype)


def test_the_network() -> None:
    forward, backward, infer, train = cost_model.predict(CHIPS["a100"], BATCH, BF16).network()
    assert forward.flops / BATCH == pytest.approx(8.2e9, rel=0.01)  # 4.1 GMAC an image
    assert infer.flops == forward.flops
    stem = 2 * 112 * 112 * 64 * 3 * 49
    assert backward.flops == 2 * forward.flops - BATCH * stem  # the picture's gradient is not wanted
    assert train.flops == forward.flops + backward.flops
    for row in (forward, backward, infer, train):
        assert 1 < row.speedup(CHIPS["a100"], BF16) < 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "rich", None)
    file = tmp_path / "cost.json"
    assert main(["cost", "--chip", "h100", "b200", "--batch", "8", "--per-phase", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "H100 SXM, batch 8, bfloat16" in text and "B200, batch 8, bfloat16" in text
    assert "Predicted from counts; nothing was timed" in text and "conv2: weight gradient" in text
    assert all(len(line) <= tables.WIDTH for line in text.splitlines())
    h100, b200 = json.loads(file.read_text())["predictions"]
    assert (h100["chip"], b200["chip"], h100["dtype"], h100["batch"]) == ("H100 SXM", "B200", "bfloat16", 8)
    assert len(h100["blocks"]) == 3 * len(SHAPES) and len(h100["network"]) == 4
    block = next(b for b in h100["blocks"] if (b["name"], b["direction"]) == ("layer1.1", "forward"))
    assert block["count"] == 2 and block["flops"] == sum(FLOPS.values())
    assert block["fused"]["bytes"] == sum(phase["bytes"] for phase in block["fused"]["phases"])
    assert block["predicted_speedup"] == pytest.approx(
        block["eager"]["floor_seconds"] / block["fused"]["floor_seconds"]
    )


def test_the_interpreter_changes_no_count(tmp_path: Path) -> None:
    """The setting is read when Triton is imported, so the other one needs another process."""
    assert main(["cost", "--chip", "h100", "--batch", "8", "--json", str(tmp_path / "here.json")]) == 0
    other = {"1": "0", "0": "1"}[os.environ.get("TRITON_INTERPRET", "0")]
    command = [sys.executable, "-m", "resnet_fused", "cost", "--chip", "h100", "--batch", "8", "--json", "there.json"]
    root = str(Path(cost_model.__file__).absolute().parents[3])
    environment = os.environ | {"TRITON_INTERPRET": other, "PYTHONPATH": root}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "there.json").read_text() == (tmp_path / "here.json").read_text()


def test_usage_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["cost", "--batch", "0"]) == 2
    assert "at least one image" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["cost", "--chip", "v100"])
    assert stopped.value.code == 2
    assert "a100" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["cost"]) == 2
    assert "pip install resnet_fused[triton]" in capsys.readouterr().err
