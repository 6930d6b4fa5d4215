"""The tests that hypothesis draws blocks for, again and again with other seeds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from soak.outcome import Outcome

TESTS = Path(__file__).parents[1]
FILES = ("ops", "cpu")  # the emulator's and the interpreter's are a hundred times slower
PASSING = re.compile(r"(\d+) passing, \d+ failing")


def run(seconds: float, seed: int, *only: str) -> Outcome:
    """only: tests instead of all."""
    outcome, until = Outcome(), time.monotonic() + seconds
    while not outcome.counts or time.monotonic() < until:
        ended = _round(seed, *only)
        outcome.count("rounds")
        outcome.count("examples", sum(map(int, PASSING.findall(ended.stdout))))
        if ended.returncode:
            told = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
            outcome.failures.append(f"seed {seed}: " + " / ".join(told[:12] or [ended.stderr[-500:]]))
        seed += 1
    return outcome


def _round(seed: int, *only: str) -> subprocess.CompletedProcess[str]:
    where = only or tuple(str(TESTS / each) for each in FILES)
    draw = ["-m", "hypothesis", f"--hypothesis-seed={seed}", "--hypothesis-show-statistics"]
    side_by_side = [] if only else ["-n", str(os.cpu_count()), "--dist", "worksteal"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *where, *draw, *side_by_side, "-rf", "-p", "no:benchmark"],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"RESNET_FUSED_SOAK": "1"},  # support.matrix
        check=False,
    )
