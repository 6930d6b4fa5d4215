"""What happens to a tile of results while it is still in registers: bias, residual, activation, store, sums.

Every phase that produces activations ends here: convolutions forward and backward, and the passes without one.

    forward      v = act(factor * (acc + bias) + residual_scale * residual)
                 v = factor * act(acc + bias) + residual_scale * residual       where the activation is the branch's
                 out = v;   statistics of v
    backward     v = acc + residual_scale * residual
                 v = v * act'(z)        z is out, norm(y), or factor * norm(y) + s_scale * norm(s)
                 out = v;   sums of v, of v (y - center), and a third
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from resnet_fused.spec import Activation, activations

from . import operands
from .activations import activate, pass_back
from .operands import NORMALIZE, Operand, Scale, load_scale, load_slope
from .reductions import STATISTICS, SUMS, Reduction, add_tile

# What z is; UNMASKED: there is none.
UNMASKED = tl.constexpr(0)
BY_OUT = tl.constexpr(1)  # the activation's own output
BY_NORM = tl.constexpr(2)  # norm(y)
BY_SUM = tl.constexpr(3)  # the whole argument of the block's last activation: branch and skip path

# The third of SUMS.
NOTHING = tl.constexpr(0)
OVER_SKIP = tl.constexpr(1)  # v (s - center_s), after the activation's derivative
OVER_OUTPUT = tl.constexpr(2)  # v act(z), before it: the gradient of a scale behind the activation
OVER_SLOPE = tl.constexpr(3)  # v z where z <= 0, before it: the gradient of a learned slope


@dataclass(frozen=True)
class EpilogueConfig:
    """Which parts run. residual: operands.RAW or NORMALIZE, None without. mask, reduce, third: the constants above.

    act: applied to v; with a mask, v is multiplied by its derivative. branch: act comes before factor and residual.
    mask_normalizes: whether y passes a norm on its way to z. s: how the skip path enters z, as `residual`.
    sums_y: whether the second sum is wanted. batch, batch_s: whether the norms of y and s use batch statistics.
    wide: sums in float64.
    """

    residual: int | None = None
    act: Activation = activations.IDENTITY
    branch: bool = False
    mask: int = 0
    mask_normalizes: bool = True
    s: int | None = None
    reduce: int = 0
    sums_y: bool = False
    third: int = 0
    batch: bool = False
    batch_s: bool = False
    wide: bool = False

    @property
    def writes(self) -> bool:
        """Whether v is another than acc + bias."""
        return self.residual is not None or self.branch or bool(self.mask) or self.act.name != "identity"

    @property
    def trivial(self) -> bool:
        """Whether it only stores."""
        return not (self.writes or self.reduce)

    @property
    def reads_y(self) -> bool:
        return self.mask in (int(BY_NORM), int(BY_SUM)) or (self.reduce == int(SUMS) and self.sums_y)

    @property
    def reads_s(self) -> bool:
        return self.s is not None or (self.reduce == int(SUMS) and self.third == int(OVER_SKIP))


class Epilogue(NamedTuple):
    """out: [pixels, channels] or None. bias: [channels]. residual: [pixels, channels].

    mask_by: [pixels, channels], the output that BY_OUT reads. y, s: [pixels, channels], read by the sums and by z. z
    uses the tables of y and s; the sums use center and center_s [channels], None for zero. slope: a `Scale`, of an
    activation that learns one.
    """

    out: Any = None
    channels: int = 0
    bias: Any = None
    factor: Scale = Scale()
    residual: Operand = Operand()
    residual_scale: Scale = Scale()
    mask_by: Any = None
    y: Operand = Operand()
    center: Any = None
    s: Operand = Operand()
    s_scale: Scale = Scale()
    center_s: Any = None
    slope: Any = None
    reduction: Reduction = Reduction()


@triton.jit
def apply(args, acc, first, pixels, row_mask, channels, channel_mask, r0, r1, r2, CONFIG: tl.constexpr):
    """Finishes the tile acc, float32 [rows, columns]; writes it to out [pixels, channels]. Returns the running sums.

    first: the pixel, int64, from which `pixels` [rows] count. Within a tile 32 bits are enough and take half the
    registers. channels: [columns].
    """
    ACT: tl.constexpr = CONFIG.act
    NAME: tl.constexpr = ACT.name
    mask = row_mask[:, None] & channel_mask[None, :]
    start = first * args.channels
    offsets = pixels[:, None] * args.channels + channels[None, :]
    v = acc
    if args.bias is not None:
        v += tl.load(args.bias + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if CONFIG.branch:
        v = activate(v, load_slope(args.slope, channels, channel_mask, ACT), NAME)
    factor = tl.full(channels.shape, 1.0, tl.float32)
    if args.factor.value is not None:
        factor = load_scale(args.factor, channels, channel_mask)
        if CONFIG.mask == UNMASKED:
            v *= factor[None, :]
    if CONFIG.residual is not None:
        residual = operands.load_linear(
            args.residual, start, offsets, channels, channel_mask, mask, CONFIG.residual
        ).to(tl.float32)
        if args.residual_scale.value is not None:
            residual *= load_scale(args.residual_scale, channels, channel_mask)[None, :]
        v += residual
    if CONFIG.mask == UNMASKED and not CONFIG.branch:
        v = activate(v, load_slope(args.slope, channels, channel_mask, ACT), NAME)

    y = v
    s = v
    if CONFIG.reads_y:
        y = tl.load(args.y.x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if CONFIG.mask != UNMASKED:
        z = y
        if CONFIG.mask == BY_OUT:
            z = tl.load(args.mask_by + start + offsets, mask=mask, other=0.0).to(tl.float32)
        elif CONFIG.mask_normalizes:
            NARROW: tl.constexpr = args.y.x.dtype.element_ty != tl.float32
            z = operands.normalize(y, args.y.table, args.channels, channels, channel_mask, NARROW)
        if CONFIG.mask == BY_SUM:
            z *= factor[None, :]
            if CONFIG.s is not None:
                s = tl.load(args.s.x + start + offsets, mask=mask, other=0.0).to(tl.float32)
                through = s
                if CONFIG.s == NORMALIZE:
                    NARROW_S: tl.constexpr = args.s.x.dtype.element_ty != tl.float32
                    through = operands.normalize(s, args.s.table, args.channels, channels, channel_mask, NARROW_S)
                if args.s_scale.value is not None:
                    through *= load_scale(args.s_scale, channels, channel_mask)[None, :]
                z += through
        slope = load_slope(args.slope, channels, channel_mask, ACT)
        if CONFIG.third == OVER_OUTPUT:
            r2 += tl.sum(widened(tl.where(mask, v * activate(z, slope, NAME), 0.0), CONFIG.wide), 0)
        elif CONFIG.third == OVER_SLOPE:
            r2 += tl.sum(widened(tl.where(mask & ~(z > 0), v * z, 0.0), CONFIG.wide), 0)
        v = pass_back(v, z, slope, NAME)
    if args.out is not None:
        stored = v.to(args.out.dtype.element_ty)
        tl.store(args.out + start + offsets, stored, mask=mask)
        v = stored.to(tl.float32)  # the sums count the values that later phases read
    v = widened(v, CONFIG.wide)
    if CONFIG.reduce == STATISTICS:
        r0, r1, r2 = add_tile(r0, r1, r2, v, row_mask)
    elif CONFIG.reduce == SUMS:
        v = tl.where(mask, v, 0.0)
        r0 += tl.sum(v, 0)
        if CONFIG.sums_y:
            r1 += tl.sum(v * centered(y, args.center, channels, channel_mask, mask), 0)
        if CONFIG.third == OVER_SKIP:
            if CONFIG.s is None:
                s = tl.load(args.s.x + start + offsets, mask=mask, other=0.0).to(tl.float32)
            r2 += tl.sum(v * centered(s, args.center_s, channels, channel_mask, mask), 0)
    return r0, r1, r2


@triton.jit
def widened(v, WIDE: tl.constexpr):
    if WIDE:
        return v.to(tl.float64)
    else:
        return v


@triton.jit
def centered(y, center, channels, channel_mask, mask):
    """y [rows, columns] minus center [channels]; zero where `mask` is false."""
    if center is not None:
        y -= tl.load(center + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, y, 0.0)
