"""What every command prints and writes alike: words coloured on a terminal, JSON in a file or on standard output."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import rich.console
    import rich.text
except ImportError:
    rich = None  # type: ignore[assignment]

HEADER = r"(?m)^.*(?=\n ?─)"
STYLES = {
    HEADER: "bold",
    r"─+": "dim",
    r"(?m)\bok$": "green",
    r"\bWRONG\b": "bold red",
    r"(?<=  )available\b": "green",
    r"(?<=  )unavailable\b": "yellow",
}


def say(text: str) -> None:
    """Prints; in colours where standard output is a terminal, rich is installed, and NO_COLOR is not set."""
    if rich is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        print(text, flush=True)
        return
    coloured = rich.text.Text(text)
    for pattern, style in STYLES.items():
        coloured.highlight_regex(re.compile(pattern), style)
    rich.console.Console(file=sys.stdout, highlight=False).print(coloured, soft_wrap=True)


class StandardOutput:
    """Takes the place of a file: ``--json -``."""

    def __init__(self) -> None:
        self.text = ""

    def write_text(self, text: str) -> None:
        """Keeps it until the command is done; it replaces what a part of the work has written before."""
        self.text = text

    def __str__(self) -> str:
        return "-"


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--json FILE``."""
    parser.add_argument(
        "--json", type=_file, metavar="FILE", help=f"write {what} there; - prints it, and tables to standard error"
    )


def _file(name: str) -> Path | StandardOutput:
    return StandardOutput() if name == "-" else Path(name)


@contextlib.contextmanager
def json_on_standard_output(file: object) -> Iterator[None]:
    """Where `file` is a `StandardOutput`, that alone is printed there, at the end; all else on standard error."""
    if not isinstance(file, StandardOutput):
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
    print(file.text, end="", flush=True)
