"""Without x86-64's instructions, as on other processors: the engine's convolutions in plain C++."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "csrc" / "cpu" / "engine"
ROWS = ROOT / "csrc" / "cpu" / "kernels"
CXX = os.environ.get("CXX") or "g++"


@pytest.mark.skipif(shutil.which(CXX) is None, reason="compiles")
def test_the_engine_without_x86(tmp_path: Path) -> None:
    sources = [Path(__file__).with_name("sanitize.cpp"), ENGINE / "layout.cpp", ENGINE / "schedule.cpp"]
    sources += sorted(ENGINE.glob("products_*.cpp")) + sorted(ROWS.glob("*_kernels_*.cpp"))
    flags = ["-std=c++20", "-O1", "-pthread", "-fno-trapping-math", "-DRESNET_FUSED_PORTABLE"]
    program = tmp_path / "portable"
    subprocess.run([CXX, *flags, *map(str, sources), "-o", str(program)], check=True)
    symbols = subprocess.run(["nm", "-C", str(program)], check=True, capture_output=True, text=True).stdout
    assert "baseline::" in symbols and "avx2::" not in symbols
    ran = subprocess.run([str(program), "40"], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "clean"
