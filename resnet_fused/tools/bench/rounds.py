"""Turns: every round runs each contender once and the order rotates.

Whatever else the machine does falls on all of them alike; the figure that counts is the ratio of two contenders' times
in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Turn = Callable[[], float]
Progress = Callable[[str], None]


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least two values."""
        values = list(values)
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(low, statistics.median(values), high)

    def to_dict(self) -> dict[str, float]:
        return {"p20": self.low, "p50": self.middle, "p80": self.high}

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"


def ratios(above: Iterable[float], below: Iterable[float]) -> Spread:
    """Of two contenders' seconds, round by round."""
    return Spread.of(a / b for a, b in zip(above, below, strict=True))


def interleaved(turns: Mapping[str, Turn], rounds: int, progress: Progress = lambda _: None) -> dict[str, list[float]]:
    """What every turn returns in every round, after one round that does not count.

    turns: each runs once and returns its seconds. rounds: at least 2, else ValueError.
    """
    if rounds < 2:
        raise ValueError(f"got rounds={rounds}; accepted: at least 2, for there to be a spread")
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            progress(f"{name}, round {number} of {rounds}" if number else f"{name}, warm-up")
            taken = turns[name]()
            if number:
                seconds[name].append(taken)
    return seconds


def timed(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Turn:
    """A turn of one step; clock: what tells the seconds."""

    def turn() -> float:
        start = clock()
        step()
        return clock() - start

    return turn
