"""The kernels under AddressSanitizer: clean, and not clean with an overrun planted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def under_sanitizer(launcher: Path, *dtypes: str) -> subprocess.CompletedProcess[str]:
    """PyTorch asks for memory where AddressSanitizer sees it, and throws through libstdc++, which it watches, too."""
    preloaded = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    program = Path(__file__).parents[1] / "emulator" / "sanitized.py"
    environment = {**os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(program), str(launcher), *dtypes]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_address_sanitizer_finds_nothing(launcher_of: Callable[[str], Path]) -> None:
    done = under_sanitizer(launcher_of("sanitized"), "float32", "bfloat16")
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]


def test_address_sanitizer_finds_a_planted_overrun(launcher_of: Callable[[str], Path]) -> None:
    done = under_sanitizer(launcher_of("overrun"), "bfloat16")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "WRITE of size 2" in done.stderr, done.stderr
