"""The examples of physics run, and each number that they print is what the theory says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frames(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as film:
        return film.n_frames  # type: ignore[attr-defined]


def test_heat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    numbers = example("heat").main(["--size", "24", "--frames", "3", "--out", str(tmp_path)])
    assert numbers["modes: largest error"] < 1e-12  # rounding of 20 steps in float64
    for dims in (1, 2):
        for side, growth in ((0.99, 0.98), (1.01, 1.02)):  # |1 - 2 side|, the checkerboard's factor
            measured = numbers[f"limits: {dims}-d at {side} of the limit, growth a step"]
            assert measured == pytest.approx(growth, rel=1e-9)
    for name, order in {"dx, explicit": 2, "dt, explicit": 1, "dt, backward Euler": 1, "dt, Crank-Nicolson": 2}.items():
        assert numbers[f"orders: {name}"] == pytest.approx(order, abs=0.05), name  # errors are not yet infinitely small
    assert numbers["learned: relative error of alpha"] < 0.01  # the bound
    for scheme, peclet in (("central", 1.9), ("central", 8.0), ("upwind", 8.0)):
        name = f"flow: {scheme}, Peclet {peclet:g}"
        for side in (0.99, 1.01):
            # the 500th root of a power that rounding changes by 1e-13
            assert numbers[f"{name}, {side} of the limit, off by"] < 1e-12
            assert (numbers[f"{name}, {side} of the limit, growth"] < 1) == (side < 1)
        overshoots = numbers[f"{name}, overshoot"]
        assert overshoots > 0.05 if (scheme, peclet) == ("central", 8.0) else overshoots < 1e-12
    assert frames(tmp_path / "heat.gif") == 3 and (tmp_path / "heat.png").stat().st_size > 0
    assert "BLOWS UP" in capsys.readouterr().out


def test_schroedinger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--frames", "9", "--steps", "20", "--out", str(tmp_path)]
    numbers = example("schroedinger").main(arguments)
    for name in ("leapfrog: change of the norm", "Crank-Nicolson: change of the norm"):
        assert numbers[name] < 1e-10, name  # the bound
    assert numbers["Crank-Nicolson: change of the energy"] < 1e-9  # the same error times energies of about 10
    for name in ("dt, leapfrog", "dt, Crank-Nicolson", "dx"):
        assert numbers[f"orders: {name}"] == pytest.approx(2, abs=0.05), name
    assert numbers["phase velocity: largest relative error"] < 1e-12  # rounding of 100 steps
    assert numbers["group velocity: relative error"] < 1e-4  # |R|^2 + |I|^2 of times dt/2 apart is no exact density
    assert numbers["tunnelling: relative error"] < 0.02  # of dx^2: plane waves of the equation, not of the grid
    assert 0.3 < numbers["tunnelling: part"] < 0.5
    assert numbers["energy: relative error"] < 0.01  # (k dx)^2 / 12 = 0.3 %
    assert numbers["limit: below"] < 10 and numbers["limit: above"] > 1e20
    assert frames(tmp_path / "schroedinger.gif") == 9 and (tmp_path / "schroedinger.png").stat().st_size > 0
    assert "part that tunnels" in capsys.readouterr().out


def test_figures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from resnet_fused.tools.figures import new_figure

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install resnet_fused\[pictures\]"):
        new_figure(1, 1)


@pytest.mark.parametrize("name", ["heat", "schroedinger"])
def test_the_films_of_the_docs_are_small(name: str) -> None:
    pictures = FOLDER.parent / "docs" / "pictures"
    assert 0 < (pictures / f"{name}.gif").stat().st_size < 600_000
    assert 0 < (pictures / f"{name}.png").stat().st_size < 150_000
