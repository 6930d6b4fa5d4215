"""What docs/theory shows as code prints what the page says, and the pictures it shows exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

THEORY = Path(__file__).parents[2] / "docs" / "theory"


def test_scaled_residuals(capsys: pytest.CaptureFixture[str]) -> None:
    """To the digits shown: two or three, which another CPU's rounding in fp32 does not reach."""
    page = (THEORY / "scaled_residuals.md").read_text()
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.S)
    exec(compile(code, "scaled_residuals.md", "exec"), {})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", ["scaled_residuals", "stability", "plain_and_residual"])
def test_pictures_exist_and_are_small(name: str) -> None:
    pictures = re.findall(r"\]\((\S+\.png)\)", (THEORY / f"{name}.md").read_text())
    assert pictures
    assert all((THEORY / picture).stat().st_size < 150_000 for picture in pictures)
