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

# Tables are float32 [rows, channels]. The last row has the center folded into the constant. That costs digits where
# |mean| is far above the deviation: none that 16 bits would show, and it saves registers, so it serves 16-bit tensors.
NORM_ROWS = 4  # scale, shift, center, shift - scale * center
GRADIENT_ROWS = 5  # k_dz, k_y, k, center, k - k_y * center


class Operand(NamedTuple):
    """x: [pixels, channels]. table: float32, the rows above. y: [pixels, channels], for GRADIENT."""

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
    """The tile at `offsets`, int32 [rows, columns], from the element `start`, int64; its columns are `channels`.

    Zero where `mask` is false, whatever the norm: padding follows the activation. Stored values come in their own
    dtype, computed ones in float32.
    """
    x = tl.load(operand.x + start + offsets, mask=mask, other=0.0)
    if KIND == RAW and not RELU:
        return x
    else:
        v = x.to(tl.float32)
        NARROW: tl.constexpr = operand.x.dtype.element_ty != tl.float32
        if KIND == NORMALIZE:
            v = normalize(v, operand.table, operand.channels, channels, channel_mask, NARROW)
        elif KIND == GRADIENT:
            v *= load_row(operand.table, 0, operand.channels, channels, channel_mask)
            if operand.y is not None:
                y = tl.load(operand.y + start + offsets, mask=mask, other=0.0).to(tl.float32)
                k_y = load_row(operand.table, 1, operand.channels, channels, channel_mask)
                if NARROW:
                    v += k_y * y + load_row(operand.table, 4, operand.channels, channels, channel_mask)
                else:
                    y -= load_row(operand.table, 3, operand.channels, channels, channel_mask)
                    v += k_y * y + load_row(operand.table, 2, operand.channels, channels, channel_mask)
        if RELU:
            v = relu(v)
        return tl.where(mask, v, 0.0)


@triton.jit
def normalize(v, table, width, channels, channel_mask, NARROW: tl.constexpr):
    """norm(v) of float32 [rows, N]; NARROW: for values that come from and go to 16 bits."""
    scale = load_row(table, 0, width, channels, channel_mask)
    if NARROW:
        return v * scale + load_row(table, 3, width, channels, channel_mask)
    else:
        center = load_row(table, 2, width, channels, channel_mask)
        return (v - center) * scale + load_row(table, 1, width, channels, channel_mask)


@triton.jit
def load_row(table, row, width, channels, channel_mask):
    return tl.load(table + row * width + channels, mask=channel_mask, other=0.0)[None, :]


@triton.jit
def relu(v):
    """max(v, 0), and NaN for NaN as in PyTorch."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def load_scale(scale, channels, channel_mask):
    return tl.load(scale.value + channels * scale.stride, mask=channel_mask, other=0.0).to(tl.float32)
