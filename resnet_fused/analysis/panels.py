"""The look of the analyses' figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resnet_fused.tools.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESIDUAL, PLAIN, OTHER, SOFT = "#0a6ebd", "#c8553d", "#3c8d5a", "#7a8794"


def side_by_side(
    panels: int = 1, width: float = 5.0, height: float = 3.8, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side; sizes in inches a panel. Raises ImportError without matplotlib."""
    figure = new_figure(width * panels, height)
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
