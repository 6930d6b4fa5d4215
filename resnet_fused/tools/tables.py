"""Tables for the terminal: rich where it is installed, aligned plain text elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence

try:
    import rich.box
    import rich.console
    import rich.markup
    import rich.table
except ImportError:
    rich = None  # type: ignore[assignment]

WIDTH = 120


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header, columns of numbers right aligned; ends without a newline."""
    numbers = [all(not cell or cell[0].isdigit() for cell in column) for column in zip(*rows, strict=True)]
    if rich is None:
        return _plain(title, header, rows, numbers)
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name, number in zip(header, numbers or [False] * len(header), strict=True):
        drawn.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(rich.markup.escape, row))
    # text, wherever it is printed: in a notebook rich would display it itself, and FORCE_COLOR would put colours in
    console = rich.console.Console(file=io.StringIO(), width=WIDTH, force_jupyter=False, color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join([title, *(line.rstrip() for line in captured.get().splitlines() if line.strip())])


def _plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, numbers or [False] * len(row), strict=True)
        return "  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in cells).rstrip()

    return "\n".join([title, line(header), line(["-" * width for width in widths]), *map(line, rows)])
