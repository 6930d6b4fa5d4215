"""Two versions: the wrong one is named, and then no ratio is printed."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.tools.bench import command
from resnet_fused.tools.bench.compare import _built, compare
from resnet_fused.tools.cli import main

SMALL = ["bench", "--size", "32", "--batch", "2", "--rounds", "2", "--threads", "1"]


class Fake:
    """`Side` with the errors it is told."""

    def __init__(self, error: float, seconds: float) -> None:
        self.error, self.seconds, self.turns = error, seconds, 0

    def __call__(self, method: str, *given: Any) -> Any:
        return getattr(self, method)(*given)

    def errors(self, mode: str, dtype: str) -> dict[str, tuple[float, float]]:
        exact = 1e-6 if dtype == "float32" else 1e-2
        return {"output": (self.error if dtype == "float32" else exact, exact), "worst gradient": (exact, exact)}

    def ready(self, mode: str, dtype: str) -> None:
        pass

    def turn(self) -> float:
        self.turns += 1
        return self.seconds


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    names = [tmp_path / name for name in ("old", "new")]
    for name in names:
        name.mkdir()
    return list(map(str, names))


@pytest.mark.parametrize("wrong", [None, "base", "head"])
def test_a_wrong_version_refuses_every_ratio(
    wrong: str | None,
    folders: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fakes = {label: Fake(1e-2 if label == wrong else 1e-6, s) for label, s in (("base", 3.0), ("head", 2.0))}
    opened = functools.partial(compare, open_side=lambda label, folder: fakes[label])
    monkeypatch.setattr(command, "compare", opened)
    file = tmp_path / "a.json"
    status = main([*SMALL, "--dtype", "bfloat16", "--compare", *folders, "--json", str(file)])
    printed, record = capsys.readouterr().out, json.loads(file.read_text())["comparison"]
    assert record["ok"] is (wrong is None) and len(record["checks"]) == 2 * (1 + 2)
    if wrong is None:
        assert status == 0 and "1.500" in printed and record["timings"][0]["base"] == [3.0, 3.0]
    else:
        assert status == 1 and f"{wrong} computes something else than PyTorch: nothing was timed" in printed
        assert "WRONG" in printed and "base / head" not in printed and record["timings"] == []
        assert all(fake.turns == 0 for fake in fakes.values())


PACKAGE = """
from torch import nn

class models:
    class tiny(nn.Sequential):
        def __init__(self, fused):
            head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
            super().__init__(nn.Conv2d(3, 8, 3, 8), nn.BatchNorm2d(8), *head)

def fuse(model):
    {change}
    return model
"""


def test_both_versions_are_imported_and_checked_for_real(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("pass", "model[1].register_full_backward_hook(lambda m, given, out: (given[0] * 1.2,))")
    for folder, change in zip(folders, changes, strict=True):
        Path(folder, "resnet_fused").mkdir()
        Path(folder, "resnet_fused", "__init__.py").write_text(PACKAGE.format(change=change))
    assert main([*SMALL, "--model", "tiny", "--mode", "train", "--dtype", "float32", "--compare", *folders]) == 1
    printed = capsys.readouterr().out
    assert "head computes something else" in printed and "base / head" not in printed
    wrong = [line.split() for line in printed.splitlines() if "WRONG" in line]
    assert wrong and all("gradient" in " ".join(line) for line in wrong)  # the output is right


def test_commits_are_built_in_worktrees_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for text in ("old", "new"):
        (tmp_path / "setup.py").write_text(f"import sys; open('built', 'w').write('{text}' + ' '.join(sys.argv[1:]))")
        git("add", "setup.py")
        git("commit", "-qm", text)
    monkeypatch.chdir(tmp_path)
    with _built(["HEAD~1..HEAD"], lambda _: None) as places:
        assert [(place / "built").read_text() for place in places] == [
            f"{text}-q build_ext --inplace" for text in ("old", "new")
        ]
    assert not any(place.exists() for place in places)
    left = subprocess.run(["git", "worktree", "list"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(left.stdout.splitlines()) == 1
