"""Triton kernels of resnet_fused; installed as ``resnet_fused.triton_kernels``, never as a top-level package.

Importing this loads no kernel: `backends.triton` does, when a block first asks for one. README.md maps the folder.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache, lru_cache

import torch


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for Triton's interpreter, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y", "t")


def why_not(device: torch.device | str | None = None) -> str | None:
    """Why the `triton` backend cannot run at all or, given a device, for tensors there; None where it can."""
    if not _installed():
        return "Triton is not installed: pip install 'triton>=3.6'"
    if interpreted():
        return None
    if device is not None and torch.device(device).type != "cuda":
        return f"Triton kernels run on CUDA tensors, x is on {device} (TRITON_INTERPRET=1 runs them, slowly)"
    if not torch.cuda.is_available():
        return "Triton kernels need a CUDA device, torch sees none"
    if device is None:
        reasons = [_too_old(gpu) for gpu in range(torch.cuda.device_count())]
        return None if None in reasons else reasons[0]
    index = torch.device(device).index
    return _too_old(torch.cuda.current_device() if index is None else index)


@lru_cache(maxsize=64)
def _too_old(gpu: int) -> str | None:
    capability = torch.cuda.get_device_capability(gpu)
    return None if capability >= (8, 0) else f"Triton kernels need compute capability 8.0, cuda:{gpu} has {capability}"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
