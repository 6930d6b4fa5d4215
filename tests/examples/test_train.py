"""examples/train.py: what it prints and writes, and that an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SMALL = ["--size", "8", "--limit", "64", "--batch", "32", "--device", "cpu"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = Path(__file__).parents[2] / "examples" / "train.py"
    spec = importlib.util.spec_from_file_location("train_example", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def rows(folder: Path) -> list[dict[str, str]]:
    """log.csv without the speed, which no two runs share."""
    with (folder / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "images_per_second":
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: model, momentum, schedule, history, random numbers. The second epoch is interrupted before it is saved,
    when random numbers were drawn and weights changed that the checkpoint does not have."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*SMALL, "--epochs", "2"]
    train.main([*arguments, "--checkpoint", str(whole / "last.pt"), "--out", str(whole)])

    evaluate, calls = train.evaluate, []

    def once(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*given)

    to_parts = ["--checkpoint", str(parts / "last.pt"), "--out", str(parts)]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "evaluate", once)
        train.main([*arguments, *to_parts])
    assert len(rows(parts)) == 1
    torch.manual_seed(99)  # as in another process
    train.main([*arguments, *to_parts, "--resume"])

    assert rows(parts) == rows(whole) and len(rows(whole)) == 2
    assert_same(torch.load(parts / "last.pt"), torch.load(whole / "last.pt"))
    for folder in (parts, whole):
        (folder / "last.pt").unlink()  # 90 MB each, which pytest would keep


def test_what_is_printed_and_written(train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the curve needs it")
    train.main([*SMALL, "--epochs", "2", "--amp", "bfloat16", "--memory", "low", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "9 of 9 blocks fused" in printed and "on 359 held-out examples" in printed
    log = rows(tmp_path)
    assert f"accuracy {float(log[-1]['accuracy']):.2%}" in printed
    assert float(log[1]["train_loss"]) < float(log[0]["train_loss"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_eager_trains_alike(train: ModuleType, tmp_path: Path) -> None:
    """The first epoch is two steps: the first one's loss is the same but for rounding, and the second one's weights
    are off by the learning rate times the rounding of gradients. 2e-5 is a hundred times what was seen."""
    losses = []
    for run in ("--fused", "--eager"):
        train.main([*SMALL, "--epochs", "1", run, "--out", str(tmp_path)])
        losses.append(float(rows(tmp_path)[0]["train_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def test_a_folder_of_pictures(train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision", reason="pictures are read by it")
    image = pytest.importorskip("PIL.Image", reason="pictures are written by it")
    generator = torch.Generator().manual_seed(0)
    for name, tint in (("blue", 2), ("red", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(0, 80, (40, 48, 3), dtype=torch.uint8, generator=generator)
            pixels[..., tint] += 150
            image.fromarray(pixels.numpy()).save(tmp_path / "data" / name / f"{i}.png")
    given = ["--data", str(tmp_path / "data"), "--size", "72", "--batch", "4", "--epochs", "1", "--device", "cpu"]
    train.main([*given, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "9 of 9 blocks fused" in printed and "on 2 held-out examples" in printed


@pytest.mark.parametrize(
    ("given", "exists", "message"),
    [
        (["--resume"], False, "--resume needs --checkpoint FILE"),
        (["--checkpoint", "FILE", "--resume"], False, "does not exist; leave --resume away to begin"),
        (["--checkpoint", "FILE"], True, "exists; add --resume to continue it, or remove it"),
        (["--memory", "low", "--eager"], False, "--memory low is for fused blocks, got --eager"),
        (["--batch", "0"], False, "--batch must be positive, got 0"),
    ],
)
def test_bad_arguments(
    train: ModuleType,
    given: list[str],
    exists: bool,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "last.pt"
    if exists:
        file.touch()
    with pytest.raises(SystemExit):
        train.main([str(file) if word == "FILE" else word for word in given])
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(train: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    given = [*SMALL, "--limit", "32", "--checkpoint", str(file), "--out", str(tmp_path)]
    train.main([*given, "--epochs", "1"])
    with pytest.raises(ValueError, match=r"another run: --epochs was 1, now 2; --lr was 0\.05, now 0\.1"):
        train.main([*given, "--epochs", "2", "--lr", "0.1", "--resume"])
    file.unlink()
