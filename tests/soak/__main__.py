"""``make soak``: each trial in a process of its own, for its share of the minutes. A table; exit status 1 if one fails.

PYTHONPATH=tests python -m soak --minutes 20 --out benches/results/soak.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from soak.outcome import Outcome

TRIALS = {
    "memory": "a thousand steps and more without growth",
    "threads": "eight threads call one module",
    "workers": "forked and spawned processes",
    "interruptions": "Ctrl-C and lack of memory in the middle of a step",
    "specs": "blocks that hypothesis draws, other ones each time",
}
SHARES = {"memory": 0.15, "threads": 0.1, "workers": 0.1, "interruptions": 0.15, "specs": 0.5}
GRACE = 900  # seconds that a trial may take beyond its share: it ends what it has begun


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of all trials together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="printed; repeats a run (default: the time)")
    parser.add_argument("--only", choices=TRIALS, help="one trial, in this process; prints its outcome as JSON")
    parser.add_argument("--out", type=Path, help="write the table there, as Markdown")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(asdict(import_module(f"soak.{given.only}").run(given.minutes * 60, given.seed))))
        return 0
    print(f"seed {given.seed}", flush=True)
    outcomes = {}
    for name, share in SHARES.items():
        outcomes[name] = _apart(name, given.minutes * share, given.seed)
        print("\n".join(_lines(name, outcomes[name])), flush=True)
    if given.out:
        given.out.write_text(_page(outcomes, given.minutes, given.seed))
    return int(any(outcome.failures for outcome in outcomes.values()))


def _apart(name: str, minutes: float, seed: int) -> Outcome:
    command = [sys.executable, "-m", "soak", "--only", name, "--minutes", str(minutes), "--seed", str(seed)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=minutes * 60 + GRACE, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(failures=[f"hung: {GRACE} s over its time"])
    if ended.returncode:
        told = ended.stderr.strip().splitlines()[-12:]
        return Outcome(failures=[f"ended with {ended.returncode}: {' / '.join(told)}"])
    return Outcome(**json.loads(ended.stdout.strip().splitlines()[-1]))


def _lines(name: str, outcome: Outcome) -> list[str]:
    done = [f"{count} {what}" for what, count in outcome.counts.items()]
    figures = [f"{what}: {value}" for what, value in outcome.figures.items()]
    verdict = [f"FAILED: {failure}" for failure in outcome.failures[:20]] or ["passed"]
    return [f"{name}: {TRIALS[name]}", *(f"  {line}" for line in (*done, *figures, *verdict))]


def _page(outcomes: dict[str, Outcome], minutes: float, seed: int) -> str:
    rows = [
        f"| {TRIALS[name]} | {', '.join(f'{n} {what}' for what, n in each.counts.items())} "
        f"| {', '.join(f'{what}: {value}' for what, value in each.figures.items())} "
        f"| {'; '.join(each.failures) or 'passed'} |"
        for name, each in outcomes.items()
    ]
    head = [
        "# make soak",
        "",
        f"{minutes:g} minutes, seed {seed}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
        "",
        "| trial | done | measured | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
