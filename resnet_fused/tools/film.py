"""Films of figures as GIF: matplotlib draws each frame, Pillow writes them with one small palette."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Film:
    """Frames in the order in which they are added.

    colours: of the palette, which all frames share; few make small files.
    """

    def __init__(self, colours: int = 64) -> None:
        self._colours = colours
        self._frames: list[Any] = []

    def add(self, drawn: Figure) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        self._frames.append(Image.fromarray(_pixels(canvas)).convert("RGB"))

    def save(self, path: Path, seconds: float) -> int:
        """Writes a GIF that repeats, each frame shown so long and the last one ten times; returns its bytes."""
        from PIL import Image

        palette = _side_by_side(self._frames[:: max(1, len(self._frames) // 8)]).quantize(self._colours)
        frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in self._frames]
        each = round(1000 * seconds)
        times = [each] * (len(frames) - 1) + [10 * each]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
        return path.stat().st_size


def _side_by_side(frames: list[Any]) -> Any:
    from PIL import Image

    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    return strip


def _pixels(canvas: Any) -> Any:
    import numpy as np

    return np.asarray(canvas.buffer_rgba())
