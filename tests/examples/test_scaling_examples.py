"""The examples of docs/theory at small sizes: what they print is what theory says, and their pictures are written."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its NamedTuples look their names up there
    spec.loader.exec_module(module)
    return module


def test_depth_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60 blocks. Zeros around 16 x 16 pixels take some of the mean square, so growth stays below that of theory:
    at 1 / sqrt(L) within 15 % of sqrt(e), at 1 / L within 2 % of 1, at 1 beyond a million.
    """
    out = tmp_path / "pictures" / "depth.png"
    passages = example("depth_scaling").main(["--blocks", "60", "--channels", "8", "--out", str(out)])
    found = {p.name: p for p in passages}
    assert found["1/√L"].signal[-1] == pytest.approx(math.sqrt(math.e), rel=0.15)
    assert found["1/√L"].gradient[0] == pytest.approx(math.sqrt(math.e), rel=0.15)
    assert found["1/L"].signal[-1] == pytest.approx(1, rel=0.02)
    assert found["1/L"].gradient[0] == pytest.approx(1, rel=0.02)
    assert found["1/L"].moved < 0.2 < found["1/√L"].moved
    assert found["1"].signal[-1] > 1e6 and found["1"].gradient[0] > 1e6
    assert [len(p.signal) for p in passages] == [61, 61, 61]
    assert "1/√L" in capsys.readouterr().out
    assert out.read_bytes().startswith(PNG)


def test_contraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three blocks, one epoch. At a rate of at most 0.9 a hundred iterations leave 0.9^100 = 3e-5 of the start at most
    in each block, of which the last multiplies errors by 1 / (1 - 0.9) at most for each block behind it.
    """
    pytest.importorskip("sklearn")
    out = tmp_path / "contraction.png"
    module = example("contraction")
    held, free = module.main(["--blocks", "3", "--epochs", "1", "--images", "400", "--out", str(out)])
    assert held.bound <= module.BETA + 1e-9 < free.bound
    assert held.errors[-1] <= 3e-5 * 10**2
    assert held.errors[-1] < 1e-3 * held.errors[0]
    assert held.restored.shape == held.images.shape == (8, 1, 8, 8)
    assert "Lip(g) ≤ 0.9" in capsys.readouterr().out
    assert out.read_bytes().startswith(PNG)


def test_plain_and_residual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That it runs: both networks, a loss for every step. What fifty layers learn is the example's own to show."""
    pytest.importorskip("sklearn")
    out = tmp_path / "plain.png"
    options = ["--depth", "8", "--epochs", "1", "--images", "256", "--seeds", "1", "--processes", "0"]
    residual, plain = example("plain_and_residual").main([*options, "--out", str(out)])
    assert residual.setting.skip and not plain.setting.skip
    assert len(residual.losses) == len(plain.losses) == 3
    assert all(math.isfinite(loss) for loss in residual.losses + plain.losses)
    assert "residual, 8 layers" in capsys.readouterr().out
    assert out.read_bytes().startswith(PNG)
