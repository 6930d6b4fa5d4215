"""``resnet-fused analyze``: every subject prints, draws and writes; what it cannot use it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

from resnet_fused.models import BasicBlock
from resnet_fused.tools import named_models
from resnet_fused.tools.cli import main

SUBJECTS = {
    "gradients": ["--model", "resnet18", "--size", "32", "--steps", "1"],
    "jacobian": ["--size", "6", "--whole"],
    "kinks": ["--model", "torchvision:resnet18", "--resolution", "8", "--depths", "1", "2"],
    "degree": ["--power", "2", "--depth", "2"],
    "receptive-field": ["--model", "resnet18", "--size", "64", "--inputs", "1", "--layer", "layer2.0"],
    "geometry": ["--model", "resnet18", "--size", "64"],
}
PRINTED = {
    "gradients": ("layer4.1", "3.487e+09"),
    "jacobian": ("block 2", "sum, I + J", "plain", "logits to input"),
    "kinks": ("identity path", "at 8 steps"),
    "degree": ("1 x^1, 2 x^2, 2 x^3, 1 x^4",),
    "receptive-field": ("resnet18, without skips", "by formula"),
    "geometry": ("layer4.1.conv2", "435", "65 pixels, at which every layer keeps the centre"),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject(
    subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    if subject == "kinks":
        pytest.importorskip("torchvision")
    if subject == "jacobian":  # of a whole ResNet it takes too long
        net = nn.Sequential(nn.Conv2d(3, 4, 1), BasicBlock(4, 4), BasicBlock(4, 4))
        monkeypatch.setattr(named_models, "build", lambda name: net)
    file = tmp_path / "found.json"
    assert main(["analyze", subject, *SUBJECTS[subject], "--plots", str(tmp_path / "plots"), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in PRINTED[subject])
    record = json.loads(file.read_text())
    assert record["setting"]["subject"] == subject and len(record) >= 2
    assert (tmp_path / "plots" / f"{subject}.png").read_bytes().startswith(b"\x89PNG")


def test_timm_models_open_their_branches(capsys: pytest.CaptureFixture[str]) -> None:
    """Their branches start at zero, where a plain copy would be constant."""
    pytest.importorskip("timm")
    assert main(["analyze", "gradients", "--model", "timm:resnet18", "--size", "32", "--steps", "0"]) == 0
    printed = capsys.readouterr().out
    assert "8 blocks of timm:resnet18 start as the identity" in printed and "plain, at the start" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["jacobian", "--model", "resnet18", "--block", "layer3.7"],
            "no block is named 'layer3.7' (8 are known); near",
        ),
        (["receptive-field", "--model", "resnet18", "--size", "16"], "16 x 16, smaller than the total stride 32"),
        (["geometry", "--model", "resnet51"], "unknown model 'resnet51'"),
        (["geometry", "--model", "torchvision:resnet51"], "unknown model 'torchvision:resnet51'"),
        (["gradients", "--model", "resnet18", "--batch", "0"], "got --size 64, --batch 0; accepted: 1 or more"),
        (["degree", "--depth", "7"], "degree 2^5; accepted"),
    ],
)
def test_what_cannot_be_used(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("resnet-fused analyze: ") and message in told


def test_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["analyze", "degree", "--depth", "1", "--plots", str(tmp_path)]) == 2
    assert "pip install resnet_fused[pictures]" in capsys.readouterr().err
    assert main(["analyze", "degree", "--depth", "1"]) == 0
