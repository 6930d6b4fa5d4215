"""What a trial did, and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """counts: how often each thing was done. figures: what was measured, with its unit. failures: sentences."""

    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def count(self, name: str, more: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + more
