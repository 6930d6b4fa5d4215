"""The command line: exit status, messages, files."""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.backends.tune import Measured, Tuning
from resnet_fused.ops import operators, reference
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec
from resnet_fused.tools import cli, named_models, pictures, tables, terminal
from resnet_fused.tools.cli import main
from resnet_fused.tools.info import info

SMALL = ["--model", "resnet18", "--size", "33", "--batch", "2", "--seeds", "1", "--backend", "eager"]
right = reference.residual_block


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model name stands for a single small block."""
    downsample = nn.Sequential(nn.Conv2d(3, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    net = nn.Sequential(models.BasicBlock(3, 8, 2, downsample))
    monkeypatch.setattr(named_models, "build", lambda name: net)


def test_verify_passes_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    file = tmp_path / "report.json"
    assert main(["verify", *SMALL, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["ok"] is True and report["train"] is False and len(report["parts"]) == 10
    assert report["layout"] == "contiguous" and report["device"] == "cpu" and report["seeds"] == 1
    printed = capsys.readouterr().out
    assert "the whole model" in printed and "0 of 9 blocks run fused" in printed


@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_verify_keeps_to_the_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    seen = []

    def watched(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
        seen.append((x.is_contiguous(), params.stages[0].weight.is_contiguous(memory_format=torch.channels_last)))
        return right(x, params, spec)

    monkeypatch.setattr(reference, "residual_block", watched)
    assert main(["verify", *SMALL, "--layout", layout]) == 0
    assert set(seen) == {(layout == "contiguous", layout == "channels_last")}


@pytest.mark.usefixtures("one_block")
def test_verify_draws_other_crops_for_each_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def noise(batch: int, size: int, folder: Path | None, seed: int) -> Tensor:
        drawn.append(seed)
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(pictures, "photographs", noise)
    assert main(["verify", *SMALL, "--seeds", "3"]) == 0
    assert {0, 1, 2} == set(drawn)


@pytest.mark.usefixtures("one_block")
def test_too_few_fused_blocks_fail(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["verify", *SMALL, "--min-fused", "0.5"]) == 1
    assert "0 of 1 blocks run fused; not 0" in capsys.readouterr().out


@pytest.mark.usefixtures("one_block")
def test_verify_fails_on_a_wrong_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    noise = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")

    def wrong(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
        return right(x, replace(params, branch_scale=1.01), spec)

    monkeypatch.setattr(reference, "residual_block", wrong)
    assert main(["verify", *SMALL, "--images", str(tmp_path)]) == 1


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", "resnet51"]) == 2
    message = capsys.readouterr().err
    assert "unknown model 'resnet51'; accepted: " in message and "resnet18, resnet34, resnet50" in message
    assert "timm:NAME" in message


def test_unusable_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *SMALL, "--images", str(tmp_path)]) == 2
    assert "accepted: a folder with .jpg" in capsys.readouterr().err
    assert main(["verify", *SMALL, "--device", "abacus"]) == 2
    assert "--device 'abacus' cannot be used" in capsys.readouterr().err
    assert main(["verify", *SMALL, "--images", str(tmp_path), "--min-fused", "90"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--dtype", "float8"])
    assert stopped.value.code == 2


def test_a_missing_dependency_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["verify", *SMALL]) == 2
    message = capsys.readouterr().err
    assert "pip install resnet_fused[pictures]" in message and "--images DIR" in message


def test_photographs_differ_and_repeat() -> None:
    pytest.importorskip("sklearn")
    x = pictures.photographs(4, 24)
    assert x.shape == (4, 3, 24, 24) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, pictures.photographs(4, 24))
    assert all(not torch.equal(x[i], x[j]) for i in range(4) for j in range(i))
    assert -2.2 < x.min() < -1 and 1 < x.max() < 2.7  # black and white under ImageNet's mean and deviation


def test_info_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(operators, "_load_error", "not built on purpose")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.count("not built on purpose") == 3  # the extension itself, and both backends: it has the schemas
    assert torch.__version__ in text and "triton" in text


def test_info_with_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_load_error", None)
    monkeypatch.setattr(
        operators, "build_info", lambda: {"compiler": "a compiler", "cuda architectures": "80, 90 + PTX"}
    )
    assert "a compiler" in info() and "80, 90 + PTX" in info()


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Those without commands of their own."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield parser
    for action in nested:
        for command in action.choices.values():
            yield from commands(command)


@pytest.mark.parametrize("command", list(commands(cli._parser())), ids=lambda command: command.prog)
def test_every_command_explains_itself(command: argparse.ArgumentParser) -> None:
    """A description, a help text for each argument with its default, and ``--json`` where it prints data."""
    assert command.description
    arguments = [action for action in command._actions if not isinstance(action, argparse._HelpAction)]
    for argument in arguments:
        assert argument.help, argument.dest
        flag = isinstance(argument.default, bool) or argument.default is None
        assert flag or "default" in argument.help, argument.dest
    assert ("json" in {argument.dest for argument in arguments}) is (command.prog != "resnet-fused completion")


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "-"]) == 0
    printed = capsys.readouterr()
    about = json.loads(printed.out)
    assert about["resnet_fused"]["torch"] == torch.__version__ and about["backends"]["eager"] is None
    assert torch.__version__ in printed.err and "Backends" in printed.err


def test_a_command_that_fails_prints_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "resnet51", "--json", "-"]) == 2
    assert capsys.readouterr().out == ""


def test_what_tune_found_as_json() -> None:
    row = Measured("layer1.0", (8, 64, 56, 56), "training", "native", "single", "none", 1.25)
    assert json.loads(Tuning([row]).to_json()) == [
        {
            "name": "layer1.0",
            "shape": [8, 64, 56, 56],
            "workload": "training",
            "backend": "native",
            "mode": "single",
            "library": "none",
            "speedup": 1.25,
        }
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = (
        "Title\n  part   ratio\n ───────\n  stem   ok\n  layer  WRONG, and a line that no terminal has room for"
        + "." * 90
    )

    def said(out: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stdout", out)
        terminal.say(text)
        return out.getvalue()

    coloured = said(Terminal())
    assert "\x1b[32mok" in coloured and "\x1b[1;31mWRONG" in coloured
    assert "." * 90 in coloured, "a long line is left to the terminal"
    assert said(io.StringIO()) == text + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert said(Terminal()) == text + "\n"


def test_completion_needs_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "pip install resnet_fused[completion]" in printed.err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "report.json").touch()

    def completed(*words: str) -> list[str]:
        call = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_resnet_fused; echo "${COMPREPLY[@]}"'
        command = ["bash", "-c", script + call, "bash", "resnet-fused", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("ex") == ["explain"]
    assert completed("analyze", "ja") == ["jacobian"]
    assert completed("verify", "--min") == ["--min-fused"]
    assert completed("verify", "--dtype", "bf") == ["bfloat16"]
    assert completed("explain", "--model", "resnet3") == ["resnet34"]
    assert completed("info", "--json", "rep") == ["report.json"]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "info"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\nresnet-fused info: interrupted\n"


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "blocks.json"
    assert main(["explain", "--model", "resnet18", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "layer4.1" in printed and printed.splitlines()[-1].startswith("9 of 9 blocks fused")
    told = json.loads(file.read_text())
    assert told["fused"] == 9 and told["rows"][8]["name"] == "layer4.1"


class Unknown(models.BasicBlock):
    """A class that no adapter knows."""


def test_match_by_structure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(named_models, "build", lambda name: nn.Sequential(nn.Conv2d(3, 8, 1), Unknown(8, 8)))
    assert main(["explain", "--match", "structure"]) == 0
    assert "1 of 1 blocks fused" in capsys.readouterr().out
    assert main(["verify", *SMALL[2:-2], "--match", "structure", "--min-fused", "1"]) == 0
    assert main(["verify", *SMALL[2:-2]]) == 2
    assert "no block of this model is fused" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "explain", "cost", "compile"])
@pytest.mark.parametrize("place", ["no/such/folder.json", "."])
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"resnet_fused.tools.cli._{command}", lambda arguments: pytest.fail("the work began"))
    assert main([command, "--json", str(tmp_path / place)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"resnet-fused {command}: --json {tmp_path / place} cannot be written (")


def test_a_failed_command_leaves_no_file(tmp_path: Path) -> None:
    assert main(["explain", "--model", "resnet51", "--json", str(tmp_path / "new.json")]) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("{}")
    assert main(["explain", "--model", "resnet51", "--json", str(tmp_path / "old.json")]) == 2
    assert (tmp_path / "old.json").read_text() == "{}"


def test_tables_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "rich", None)
    drawn = tables.table("Title", ("name", "count"), [["first", "1"], ["b", "20"]])
    assert drawn.splitlines() == ["Title", "name   count", "-----  -----", "first      1", "b         20"]


def test_a_table_is_text_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in tables.table("Title", ("name", "count"), [["first", "1"]])


@pytest.mark.usefixtures("one_block")
def test_progress_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    real = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    monkeypatch.setattr(tables, "rich", None)
    assert main(["verify", *SMALL]) == 0
