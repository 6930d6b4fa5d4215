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


PROGRAMS = {"sanitize": ("layout", "schedule"), "sanitize_gradients": ("layout", "gradient_layout", "gradient_pack")}
KERNELS = {"sanitize": "products_*.cpp", "sanitize_gradients": "gradient_products_*.cpp"}


@pytest.mark.skipif(shutil.which(CXX) is None, reason="compiles")
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_engine_without_x86(program: str, tmp_path: Path) -> None:
    sources = [Path(__file__).with_name(f"{program}.cpp"), *(ENGINE / f"{name}.cpp" for name in PROGRAMS[program])]
    sources += sorted(ENGINE.glob(KERNELS[program])) + sorted(ROWS.glob("*_kernels_*.cpp"))
    flags = ["-std=c++20", "-O1", "-pthread", "-fno-trapping-math", "-DRESNET_FUSED_PORTABLE"]
    compiled = tmp_path / "portable"
    subprocess.run([CXX, *flags, *map(str, sources), "-o", str(compiled)], check=True)
    symbols = subprocess.run(["nm", "-C", str(compiled)], check=True, capture_output=True, text=True).stdout
    assert "baseline::" in symbols and "avx2::" not in symbols and "amx::" not in symbols
    ran = subprocess.run([str(compiled), "40"], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "clean"
