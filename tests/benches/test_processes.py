"""benches/processes.py at a small size: two processes have the gradients of one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    file = tmp_path / "processes.json"
    command = [sys.executable, "benches/processes.py", "--model", "resnet18", "--batch", "4", "--size", "32"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert record["largest_difference_of_gradients"] == {"fused": 0.0, "eager": 0.0}
    assert {name: len(each) for name, each in record["seconds"].items()} == {
        f"{way}, {how}": 2
        for way in ("fused", "eager")
        for how in ("one process", "two processes", "two processes, not exchanging")
    }
