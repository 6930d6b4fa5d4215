"""Figures without a display. matplotlib is optional: it is imported when a figure is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """An empty figure of so many inches. Raises ImportError that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib: `pip install resnet_fused[pictures]` (import said: {error})"
        ) from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def save(figure: Figure, file: Path) -> None:
    """As the file's ending says; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
