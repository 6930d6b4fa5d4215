"""The values of a tensor in strides that a caller may hand over."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced(x: Tensor) -> Tensor:
    """x's values as a window of a wider tensor whose rest is NaN."""
    n, c, h, w = x.shape
    wide = torch.full((n + 1, c + 3, h + 2, 2 * w + 1), torch.nan, dtype=x.dtype)
    window = wide[1:, 2 : 2 + c, 1 : 1 + h, 1 : 1 + 2 * w : 2]
    return window.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """x's values with height and width swapped in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {
    "sliced": sliced,
    "transposed": transposed,
    "batch inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}
