"""The device: what it is, and the rates that it reaches."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import replace
from typing import Any

import torch
from gpu_bench.clock import Clock
from gpu_bench.setting import DTYPE
from gpu_bench.summary import quantiles

from resnet_fused.tools.info import machine
from resnet_fused.triton_kernels.host import chips


def measured_chip(chip: chips.Chip, clock: Clock, device: str, dry: bool) -> chips.Chip:
    """The chip with the rates that a copy and a matrix product reach here instead of the data sheet's."""
    elements, side = (1 << 16, 64) if dry else (1 << 29, 8192)
    source = torch.zeros(elements, dtype=DTYPE, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(DTYPE) for _ in range(2))
    copying, product_ = (
        [clock.sample(step).device for _ in range(8)] for step in (lambda: target.copy_(source), lambda: a @ b)
    )
    bandwidth = 2 * source.element_size() * elements / quantiles(copying[2:])[1]
    return replace(chip, bandwidth=bandwidth, half_peak=2 * side**3 / quantiles(product_[2:])[1])


def described(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {**machine(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        found |= dict(zip(asked, (part.strip() for part in answer.strip().split(",")), strict=False))
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu, dry run"
    return found
