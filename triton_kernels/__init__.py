"""Triton kernels of resnet_fused; installed as ``resnet_fused.triton_kernels``, never as a top-level package.

Importing this loads no kernel: `backends.triton` does, when a block first asks for one. README.md maps the folder.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for Triton's interpreter, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y", "t")


def why_not(device_type: str | None = None) -> str | None:
    """Why the `triton` backend cannot run (a tensor on `device_type`, if given), or None."""
    if not _installed():
        return "Triton is not installed: pip install 'triton>=3.6'"
    if interpreted():
        return None
    if device_type is not None and device_type != "cuda":
        return f"Triton kernels run on CUDA tensors, x is on {device_type} (TRITON_INTERPRET=1 runs them, slowly)"
    if not torch.cuda.is_available():
        return "Triton kernels need a CUDA device, torch sees none"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"Triton kernels need compute capability 8.0, this GPU has {torch.cuda.get_device_capability()}"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
