"""Tiles of activations as a matrix product or a pass wants them: as stored, normalised, or as the gradient dy.

All activations are NHWC; a row is a pixel, a column a channel. The prologue of every phase is `load`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

RAW = tl.constexpr(0)  # x
NORMALIZE = tl.constexpr(1)  # (x - center) * scale + shift
GRADIENT = tl.constexpr(2)  # k_dz * x + k_y * (y - center) + k, with x = dz

NORM_ROWS = 3  # of a norm's table: center, scale, shift
GRADIENT_ROWS = 4  # of a gradient's: k_dz, k_y, k, center


class Operand(NamedTuple):
    """x: [pixels, channels]. table: float32 [3 or 4, channels], the rows above. y: [pixels, channels], for GRADIENT."""

    x: Any = None
    channels: int = 0
    table: Any = None
    y: Any = None


class Scale(NamedTuple):
    """branch_scale or skip_scale: one value (stride 0) or one a channel (stride 1); without a pointer 1."""

    value: Any = None
    stride: int = 0


@triton.jit
def load(operand, start, offsets, channels, channel_mask, mask, KIND: tl.constexpr, RELU: tl.constexpr):
    """The tile at `offsets` int32 [rows, columns] from the element `start`, int64; columns are `channels`. Zero where `mask` is false, whatever the norm:
    padding follows the activation. Stored values come in their own dtype, computed ones in float32.
    """
    x = tl.load(operand.x + start + offsets, mask=mask, other=0.0)
    if KIND == RAW and not RELU:
        return x
    else:
        v = x.to(tl.float32)
        if KIND == NORMALIZE:
            columns = operand.table + channels
            center = tl.load(columns, mask=channel_mask, other=0.0)
            scale = tl.load(columns + operand.channels, mask=channel_mask, other=0.0)
            shift = tl.load(columns + 2 * operand.channels, mask=channel_mask, other=0.0)
            v = (v - center[None, :]) * scale[None, :] + shift[None, :]
        elif KIND == GRADIENT:
            columns = operand.table + channels
            v *= tl.load(columns, mask=channel_mask, other=0.0)[None, :]
            if operand.y is not None:
                k_y = tl.load(columns + operand.channels, mask=channel_mask, other=0.0)
                k = tl.load(columns + 2 * operand.channels, mask=channel_mask, other=0.0)
                center = tl.load(columns + 3 * operand.channels, mask=channel_mask, other=0.0)
                y = tl.load(operand.y + start + offsets, mask=mask, other=0.0).to(tl.float32)
                v += k_y[None, :] * (y - center[None, :]) + k[None, :]
        if RELU:
            v = relu(v)
        return tl.where(mask, v, 0.0)


@triton.jit
def relu(v):
    """max(v, 0), and NaN for NaN as in PyTorch."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def load_scale(scale, channels, channel_mask):
    return tl.load(scale.value + channels * scale.stride, mask=channel_mask, other=0.0).to(tl.float32)
