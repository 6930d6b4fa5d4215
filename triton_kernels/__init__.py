"""Triton kernels of resnet_fused; installed as ``resnet_fused.triton_kernels``, never as a top-level package.

The package has no block kernels yet; `why_not` is what the dispatcher, `explain` and `info` say about it.
"""

from __future__ import annotations

import torch


def why_not(device_type: str | None = None) -> str:
    """Why the `triton` backend cannot run (for a tensor on `device_type`, if given)."""
    if device_type is not None and device_type != "cuda":
        return f"Triton kernels run on CUDA tensors, x is on {device_type}"
    if not torch.cuda.is_available():
        return "Triton kernels need a CUDA device, torch sees none"
    return "this release has no Triton kernels for residual blocks yet"
