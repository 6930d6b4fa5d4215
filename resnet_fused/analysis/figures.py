"""Figures of the analyses. matplotlib is optional: it is imported when a figure is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESIDUAL, PLAIN, OTHER, SOFT = "#0a6ebd", "#c8553d", "#3c8d5a", "#7a8794"


def new_figure(panels: int = 1, width: float = 5.0, height: float = 3.8, title: str = "") -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side; sizes in inches a panel. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib: `pip install resnet_fused[pictures]`, or leave --plots out (import said: "
            f"{error})"
        ) from error
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(True, alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, list(axes)


def thin_labels(axes: Axes, names: tuple[str, ...] | list[str], most: int = 17) -> None:
    """The names of layers below their marks, not more of them than can be read."""
    step = -(-len(names) // most)
    places = list(range(0, len(names), step))
    axes.set_xticks(places, [names[i] for i in places], rotation=60, ha="right", rotation_mode="anchor", fontsize=7)


def save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
