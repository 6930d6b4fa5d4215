"""The weight-gradient phase: dW[k, tap, c] = sum over pixels of dy[pixel, k] * P[tap of pixel, c].

The sum over pixels is split among workers. Each split writes a float32 partial; the worker that finishes a tile last
adds the partials in the order of the splits, so the result is the same, bit for bit, in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from resnet_fused.spec import Activation

from . import operands
from .barriers import arrives_last
from .operands import Operand


@dataclass(frozen=True)
class WeightGradientConfig:
    """dy, source, act: how the prologues compute dy and P from the stored dz and the convolution's stored input.

    rows, columns, depth: the tile: output channels, input channels, pixels of one step. splits: of the pixels.
    buffers, precision, upcast: as for a convolution.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dy: int
    source: int
    act: Activation
    rows: int
    columns: int
    depth: int
    splits: int
    buffers: int
    precision: str = "ieee"
    upcast: bool = False

    @property
    def pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.padding == (0, 0)


class WeightGradient(NamedTuple):
    """dy: [batch, height, width, K]. source: the convolution's input, [batch, source_height, source_width, C].

    dweight: [K, C / groups, R, S] and its strides. partials: float32 [splits, K, R, S, C / groups], None with one
    split. tickets: int32, one per tile, zero. output_group, input_group: channels per group.
    """

    dy: Operand
    batch: int
    height: int
    width: int
    source: Operand
    source_height: int
    source_width: int
    dweight: Any
    dweight_strides: tuple[int, int, int, int]
    groups: int
    output_group: int
    input_group: int
    partials: Any
    tickets: Any


@triton.jit
def weight_gradient(args, CONFIGS: tl.constexpr, INDEX: tl.constexpr):
    """Reads dy and source, writes dweight; with several splits by way of the partials."""
    CONFIG: tl.constexpr = CONFIGS[INDEX]
    row_blocks = tl.cdiv(args.output_group, CONFIG.rows)
    column_blocks = tl.cdiv(args.input_group, CONFIG.columns)
    tiles = args.groups * row_blocks * CONFIG.kernel[0] * CONFIG.kernel[1] * column_blocks
    # neighbouring workers take the tiles of the same pixels, which they find in the cache
    for item in range(tl.program_id(0), tiles * CONFIG.splits, tl.num_programs(0)):
        split = item // tiles
        tile = item % tiles
        column = (tile % column_blocks) * CONFIG.columns + tl.arange(0, CONFIG.columns)
        rest = tile // column_blocks
        s = rest % CONFIG.kernel[1]
        rest = rest // CONFIG.kernel[1]
        r = rest % CONFIG.kernel[0]
        rest = rest // CONFIG.kernel[0]
        row = (rest % row_blocks) * CONFIG.rows + tl.arange(0, CONFIG.rows)
        group = rest // row_blocks
        row_mask = row < args.output_group
        column_mask = column < args.input_group
        acc = product(args, split, group, r, s, row, row_mask, column, column_mask, CONFIG)

        k = group * args.output_group + row
        mask = row_mask[:, None] & column_mask[None, :]
        stride_k, stride_c, stride_r, stride_s = args.dweight_strides
        out = args.dweight + (r * stride_r + s * stride_s) + k[:, None] * stride_k + column[None, :] * stride_c
        if CONFIG.splits == 1:
            tl.store(out, acc.to(args.dweight.dtype.element_ty), mask=mask)
        else:
            size = args.groups * args.output_group * CONFIG.kernel[0] * CONFIG.kernel[1] * args.input_group
            position = (k * CONFIG.kernel[0] + r) * CONFIG.kernel[1] + s
            partial = args.partials + (position * args.input_group)[:, None] + column[None, :]
            tl.store(partial + split.to(tl.int64) * size, acc, mask=mask)
            if arrives_last(args.tickets + tile, CONFIG.splits):
                total = tl.zeros_like(acc)
                for i in range(CONFIG.splits):
                    total += tl.load(partial, mask=mask, other=0.0)
                    partial += size
                tl.store(out, total.to(args.dweight.dtype.element_ty), mask=mask)


@triton.jit
def product(args, split, group, r, s, row, row_mask, column, column_mask, CONFIG: tl.constexpr):
    """The split's part of a tile, float32 [rows, columns]."""
    pixels = args.batch * args.height * args.width
    steps = tl.cdiv(tl.cdiv(pixels, CONFIG.depth), CONFIG.splits)
    start = split * steps * CONFIG.depth
    k = group * args.output_group + row
    c = group * args.input_group + column
    ROWS: tl.constexpr = CONFIG.rows  # a tuple takes no attribute of a constant
    COLUMNS: tl.constexpr = CONFIG.columns
    ACT: tl.constexpr = CONFIG.act
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, steps, num_stages=CONFIG.buffers):
        pixel = start + step * CONFIG.depth + tl.arange(0, CONFIG.depth)
        pixel_mask = pixel < pixels
        dy = operands.load_linear(
            args.dy,
            tl.cast(start + step * CONFIG.depth, tl.int64) * args.dy.channels,
            tl.arange(0, CONFIG.depth)[:, None] * args.dy.channels + k[None, :],
            k,
            row_mask,
            pixel_mask[:, None] & row_mask[None, :],
            CONFIG.dy,
        ).to(args.dy.x.dtype.element_ty)
        image0 = (start + step * CONFIG.depth) // (args.height * args.width)
        image = pixel // (args.height * args.width)
        position = pixel % (args.height * args.width)
        h = (position // args.width) * CONFIG.stride[0] + (r * CONFIG.dilation[0] - CONFIG.padding[0])
        w = (position % args.width) * CONFIG.stride[1] + (s * CONFIG.dilation[1] - CONFIG.padding[1])
        inside = pixel_mask
        if not CONFIG.pointwise:
            inside &= (h >= 0) & (h < args.source_height) & (w >= 0) & (w < args.source_width)
        source = (((image - image0) * args.source_height + h) * args.source_width + w) * args.source.channels
        p = operands.load(
            args.source,
            tl.cast(image0, tl.int64) * args.source_height * args.source_width * args.source.channels,
            source[:, None] + c[None, :],
            c,
            column_mask,
            inside[:, None] & column_mask[None, :],
            CONFIG.source,
            ACT,
        ).to(args.source.x.dtype.element_ty)
        if CONFIG.upcast:
            dy = dy.to(tl.float32)
            p = p.to(tl.float32)
        acc = tl.dot(tl.trans(dy), p, acc, input_precision=CONFIG.precision)
    return acc
