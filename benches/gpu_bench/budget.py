"""Which pieces there is time for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Budget:
    """A piece may start if there is time for the longest of its kind so far; for the first, a fifth of all time."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.unknown = 60 * minutes / 5
        self.longest: dict[Any, float] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def affords(self, kind: Any) -> bool:
        return self.left > self.longest.get(kind, self.unknown)

    @contextlib.contextmanager
    def spend(self, kind: Any) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - start)
