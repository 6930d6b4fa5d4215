"""examples/deq.py at small settings: both models learn, and the equilibrium keeps less."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("matplotlib", reason="the example draws")


def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "deq.py"
    spec = importlib.util.spec_from_file_location("deq", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deq"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "deq.png"
    arguments = ["--channels", "8", "--depth", "10", "--epochs", "3", "--images", "500", "--batch", "25"]
    equilibrium, twin = example().main([*arguments, "--learning-rate", "1e-2", "--picture", str(picture)])
    # ten classes; of 100 test pictures, about 90 are found after three short epochs, and 2 % is what one seed moves
    assert min(equilibrium.accuracy[-1], twin.accuracy[-1]) > 0.7
    assert equilibrium.parameters == twin.parameters
    # ten residual blocks keep 20 tensors of the block's size, the equilibrium 2, and both the stem's and the head's 5
    assert twin.saved > 2.5 * equilibrium.saved
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "deep equilibrium" in printed and "unrolled, 10 deep" in printed and "Saved for backward by depth" in printed
