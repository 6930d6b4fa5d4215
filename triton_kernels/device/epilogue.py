"""What happens to a tile of results while it is still in registers: bias, residual, mask or activation, store, sums.

Every phase that produces activations ends here: convolutions forward and backward, and the passes without one.

    v = factor * acc + bias + residual_scale * residual
    v = relu(v)                      forward            v = v where out > 0 (or factor * norm(y) > 0)      backward
    out = v;   statistics of v       forward            sums of v, v (y - center), v (s - center_s)        backward
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import operands
from .operands import Operand, Scale, load_scale, relu
from .reductions import STATISTICS, SUMS, Reduction, add_tile

UNMASKED = tl.constexpr(0)
BY_OUT = tl.constexpr(1)  # the activation's own output
BY_NORM = tl.constexpr(2)  # the activation's input, recomputed from y


@dataclass(frozen=True)
class EpilogueConfig:
    """Which parts run. residual: operands.RAW or NORMALIZE, None without. mask, reduce: the constants above.

    mask_normalizes: whether y passes a norm before the masking activation.
    sums_y, sums_s: whether sums over y and s are wanted. batch, batch_s: whether their norms use batch statistics.
    wide: sums in float64.
    """

    residual: int | None = None
    relu: bool = False
    mask: int = 0
    mask_normalizes: bool = True
    reduce: int = 0
    sums_y: bool = False
    sums_s: bool = False
    batch: bool = False
    batch_s: bool = False
    wide: bool = False

    @property
    def trivial(self) -> bool:
        """Whether it only stores."""
        return self.residual is None and not (self.relu or self.mask or self.reduce)


class Epilogue(NamedTuple):
    """out: [pixels, channels] or None. bias: [channels]. y, s: what the sums and the mask read, [pixels, channels].

    y.table serves the mask, center and center_s [channels] the sums; without a center it is zero.
    """

    out: Any = None
    channels: int = 0
    bias: Any = None
    factor: Scale = Scale()
    residual: Operand = Operand()
    residual_scale: Scale = Scale()
    mask: Any = None
    y: Operand = Operand()
    center: Any = None
    s: Any = None
    center_s: Any = None
    reduction: Reduction = Reduction()


@triton.jit
def apply(args, acc, first, pixels, row_mask, channels, channel_mask, r0, r1, r2, CONFIG: tl.constexpr):
    """Finishes the tile acc [rows, columns], float32. Returns the running reduction.

    first: the pixel, int64, from which `pixels` [rows] count; within a tile 32 bits are enough, and half the registers.
    """
    mask = row_mask[:, None] & channel_mask[None, :]
    start = first * args.channels
    offsets = pixels[:, None] * args.channels + channels[None, :]
    v = acc
    factor = tl.full(channels.shape, 1.0, tl.float32)
    if args.factor.value is not None:
        factor = load_scale(args.factor, channels, channel_mask)
        if CONFIG.mask != BY_NORM:
            v *= factor[None, :]
    if args.bias is not None:
        v += tl.load(args.bias + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if CONFIG.residual is not None:
        residual = operands.load(
            args.residual, start, offsets, channels, channel_mask, mask, CONFIG.residual, False
        ).to(tl.float32)
        if args.residual_scale.value is not None:
            residual *= load_scale(args.residual_scale, channels, channel_mask)[None, :]
        v += residual
    if CONFIG.relu:
        v = relu(v)
    if CONFIG.mask == BY_OUT:
        v = tl.where(tl.load(args.mask + start + offsets, mask=mask, other=0.0) <= 0, 0.0, v)
    y = v
    if CONFIG.mask == BY_NORM or (CONFIG.reduce == SUMS and CONFIG.sums_y):
        y = tl.load(args.y.x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if CONFIG.mask == BY_NORM:
        z = y
        if CONFIG.mask_normalizes:
            NARROW: tl.constexpr = args.y.x.dtype.element_ty != tl.float32
            z = operands.normalize(y, args.y.table, args.channels, channels, channel_mask, NARROW)
        v = tl.where(z * factor[None, :] <= 0, 0.0, v)
    if args.out is not None:
        stored = v.to(args.out.dtype.element_ty)
        tl.store(args.out + start + offsets, stored, mask=mask)
        v = stored.to(tl.float32)  # what later phases read is what is counted
    if CONFIG.wide:
        v = v.to(tl.float64)
    if CONFIG.reduce == STATISTICS:
        r0, r1, r2 = add_tile(r0, r1, r2, v, row_mask)
    elif CONFIG.reduce == SUMS:
        v = tl.where(mask, v, 0.0)
        r0 += tl.sum(v, 0)
        if CONFIG.sums_y:
            r1 += tl.sum(v * centered(y, args.center, channels, channel_mask, mask), 0)
        if CONFIG.sums_s:
            s = tl.load(args.s + start + offsets, mask=mask, other=0.0).to(tl.float32)
            r2 += tl.sum(v * centered(s, args.center_s, channels, channel_mask, mask), 0)
    return r0, r1, r2


@triton.jit
def centered(y, center, channels, channel_mask, mask):
    if center is not None:
        y -= tl.load(center + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, y, 0.0)
