"""What the emulator says of its launches: lines as in "3 cooperative: table; pass | convolution of 64 rows"."""

from __future__ import annotations

import re


def phases(line: str) -> list[str]:
    """Of a launch, without how they were planned."""
    return [phase.split(" of ")[0].split(",")[0] for phase in re.split(r"; | \| ", line.split(": ")[1])]


def workers(launched: list[str]) -> int:
    """The most that ran at once."""
    return max(int(line.split()[0].rstrip(":")) for line in launched)
