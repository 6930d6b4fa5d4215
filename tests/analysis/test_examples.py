"""The two examples of nature, with small settings: their numbers against formulas, their pictures drawn."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contacts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("contacts_of_a_chain", monkeypatch)


def test_a_chain_relaxes_by_the_formula(contacts: ModuleType) -> None:
    found = contacts.measure("chain", 20, ())
    assert float(found.rates[1]) == pytest.approx(4 * math.sin(math.pi / 40) ** 2, rel=1e-10)  # a path graph's
    # in the last fifth the next mode is e^-9.6 of the slowest, its share of the norm the square of that
    assert found.measured == pytest.approx(float(found.rates[1]), rel=1e-6)
    assert found.distance == 19


def test_bonds_shorten_paths_and_times(contacts: ModuleType) -> None:
    csgraph = pytest.importorskip("scipy.sparse.csgraph")
    bonds = ((2, 11), (3, 7), (13, 15))
    alone, bonded = contacts.measure("chain", 20, ()), contacts.measure("bonds", 20, bonds)
    L = contacts.laplacian(20, bonds)
    assert torch.equal(L.sum(1), torch.zeros(20, dtype=torch.float64)) and torch.equal(L, L.T)
    assert bonded.distance == csgraph.shortest_path((L.numpy() < 0).astype(float), unweighted=True)[0, -1] < 19
    assert bonded.measured == pytest.approx(float(bonded.rates[1]), rel=1e-6) and bonded.time < alone.time


def test_one_step_is_euler(contacts: ModuleType) -> None:
    L, x = contacts.laplacian(8, ((2, 6),)), torch.randn(2, 8, 1, 1, dtype=torch.float64)
    wanted = x[..., 0, 0] - contacts.STEP * x[..., 0, 0] @ L
    torch.testing.assert_close(contacts.step(x, L)[..., 0, 0], wanted, rtol=1e-13, atol=1e-14)  # sums of four terms


def test_ribonuclease(contacts: ModuleType) -> None:
    """The printed numbers, without their slow simulation."""
    chain, bonded = (contacts.laplacian(contacts.UNITS, bonds) for bonds in ((), contacts.BONDS))
    times = [1 / float(torch.linalg.eigvalsh(L)[1]) for L in (chain, bonded)]
    assert times == pytest.approx([1558, 309], abs=0.5) and times[0] / times[1] == pytest.approx(5.04, abs=0.005)
    assert (contacts.distance(chain), contacts.distance(bonded)) == (123, 61)


def test_the_contacts_print_and_draw(contacts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert contacts.main(["--units", "12", "--bonds", "2-9", "--plot", str(tmp_path / "p.png")]) == 0
    assert "times as fast" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="bond 5-30 does not fit a chain of units 1 to 12"):
        contacts.main(["--units", "12", "--bonds", "5-30"])


def test_focus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    focus = load("focus", monkeypatch)
    assert focus.main(["--depths", "2", "8", "--draws", "8", "--plot", str(tmp_path / "p.png")]) == 0
    printed = capsys.readouterr().out
    ratio = float(printed.split("narrow it to ")[1].split()[0])
    assert ratio == pytest.approx(math.sqrt(0.5), rel=0.06)  # eight draws of weights, see test_receptive_field
    assert (tmp_path / "p.png").stat().st_size > 10_000
