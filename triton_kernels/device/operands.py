"""Tiles of activations in the form that a matrix product or a pass reads: as stored, normalised, or as the gradient dy.

All activations are NHWC; a row is a pixel, a column a channel. The prologue of every phase is `load`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import activate

RAW = tl.constexpr(0)  # x
NORMALIZE = tl.constexpr(1)  # (x - center) * scale + shift
GRADIENT = tl.constexpr(2)  # k_dz * x + k_y * (y - center) + k, with x = dz

# Tables are float32 [rows, channels]. The last row has the center folded into the constant. That saves registers and
# loses digits where |mean| is far above the deviation, but none that 16 bits would show: 16-bit tensors use it.
NORM_ROWS = 4  # scale, shift, center, shift - scale * center
GRADIENT_ROWS = 5  # k_dz, k_y, k, center, k - k_y * center


class Operand(NamedTuple):
    """x: [pixels, channels]. table: float32, the rows above. y: [pixels, channels], for GRADIENT.

    slope: a `Scale`, of an activation that learns one.
    """

    x: Any = None
    channels: int = 0
    table: Any = None
    y: Any = None
    slope: Any = None


class Scale(NamedTuple):
    """branch_scale, skip_scale or a learned slope, value: [C] or [1]; without a pointer it is 1.

    bits: the mask that turns a channel's number into the index of its value: -1 keeps it, 0 where there is one value.
    """

    value: Any = None
    bits: int = 0


@triton.jit
def load(operand, start, offsets, channels, channel_mask, mask, KIND: tl.constexpr, ACT: tl.constexpr):
    """The tile at `offsets`, int32 [rows, columns], from the element `start`, int64; its columns are `channels`.

    Zero where `mask` is false, whatever the norm: padding follows the activation. Stored values come in their own
    dtype, computed ones in float32.
    """
    v = load_unmasked(operand, start, offsets, channels, channel_mask, mask, KIND)
    if KIND == RAW and ACT.name == "identity":
        return v
    else:
        NAME: tl.constexpr = ACT.name
        slope = load_slope(operand.slope, channels, channel_mask, ACT)
        return tl.where(mask, activate(v.to(tl.float32), slope, NAME), 0.0)


@triton.jit
def load_linear(operand, start, offsets, channels, channel_mask, mask, KIND: tl.constexpr):
    """`load` without an activation."""
    v = load_unmasked(operand, start, offsets, channels, channel_mask, mask, KIND)
    if KIND == RAW:
        return v
    else:
        return tl.where(mask, v, 0.0)


@triton.jit
def load_unmasked(operand, start, offsets, channels, channel_mask, mask, KIND: tl.constexpr):
    """The value before the activation, [rows, columns]; where `mask` is false it is the norm of zero."""
    x = tl.load(operand.x + start + offsets, mask=mask, other=0.0)
    if KIND == RAW:
        return x
    else:
        v = x.to(tl.float32)
        NARROW: tl.constexpr = operand.x.dtype.element_ty != tl.float32
        if KIND == NORMALIZE:
            v = normalize(v, operand.table, operand.channels, channels, channel_mask, NARROW)
        else:
            v *= load_row(operand.table, 0, operand.channels, channels, channel_mask)
            if operand.y is not None:
                y = tl.load(operand.y + start + offsets, mask=mask, other=0.0).to(tl.float32)
                k_y = load_row(operand.table, 1, operand.channels, channels, channel_mask)
                if NARROW:
                    v += k_y * y + load_row(operand.table, 4, operand.channels, channels, channel_mask)
                else:
                    y -= load_row(operand.table, 3, operand.channels, channels, channel_mask)
                    v += k_y * y + load_row(operand.table, 2, operand.channels, channels, channel_mask)
        return v


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
    """Row `row` of a table float32 [rows, width], at `channels` [N]: [1, N]."""
    return tl.load(table + row * width + channels, mask=channel_mask, other=0.0)[None, :]


@triton.jit
def load_scale(scale, channels, channel_mask):
    """The values of a `Scale` at `channels` [N], float32 [N]."""
    return tl.load(scale.value + (channels & scale.bits), mask=channel_mask, other=0.0).to(tl.float32)


@triton.jit
def load_slope(slope, channels, channel_mask, ACT: tl.constexpr):
    """The slope that `activate` takes: [1, N] where it is learned, else the activation's constant."""
    if ACT.name == "prelu":
        return load_scale(slope, channels, channel_mask)[None, :]
    else:
        return ACT.parameter
