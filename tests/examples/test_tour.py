"""The notebook runs from top to bottom, and what it shows as printed is what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def without_digits(text: str) -> str:
    """Numbers come from rounding, which differs between CPUs; the words around them do not."""
    return re.sub(r"\d[\d.e+-]*", "#", text)


def test_the_tour_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pyplot.switch_backend("Agg")
    namespace: dict[str, object] = {}
    drawn = 0
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), namespace)
            shown = "".join("".join(output.get("text", [])) for output in cell["outputs"])
            assert without_digits(capsys.readouterr().out) == without_digits(shown)
            figures = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
            assert len(pyplot.get_fignums()) == figures
            drawn += figures
            pyplot.close("all")
    assert drawn == 1
    assert NOTEBOOK.stat().st_size < 150_000
