"""The pytest-benchmark suites run, each call once and untimed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fused.ops import operators

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(operators.load_error() is not None, reason="they time the extension's operators")


@pytest.mark.parametrize(("suite", "chosen"), [("operators", ""), ("blocks", "layer4.1 and float32")])
def test_suite_runs(suite: str, chosen: str) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", f"benches/{suite}.py", "--benchmark-disable", "-p", "no:cacheprovider"]
    environment = os.environ | {"RESNET_FUSED_BENCH_SIZE": "8"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, "-k", chosen], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
