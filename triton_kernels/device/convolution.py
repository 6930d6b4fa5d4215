"""The convolution phase: an implicit matrix product over NHWC activations, forward and transposed.

    forward      y[pixel, k]  = sum over taps, c of P[tap of pixel, c] * W[k, tap, c]
    transposed   dP[pixel, c] = sum over taps, k of dy[tap of pixel, k] * W[k, tap, c]

One body serves both: rows are result pixels, columns result channels of one group, and the loop runs over taps and
blocks of source channels. The transposed form with a stride walks the pixels class by class; a pixel's class is its
position modulo the stride. All pixels of a class have the same taps that contribute: those that meet the stride's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl

from resnet_fused.spec import Activation

from . import epilogue, operands
from .epilogue import Epilogue, EpilogueConfig
from .operands import Operand
from .reductions import finish, share, zeros


@dataclass(frozen=True)
class ConvolutionConfig:
    """The constants of one convolution phase.

    source, act:   how the prologue computes its operand (operands.RAW, NORMALIZE or GRADIENT; activation).
    rows, columns, depth: the tile: result pixels, result channels, source channels of one step.
    buffers:       steps in flight: Triton's num_stages. precision: of float32 products ("ieee", "tf32").
    upcast:        multiply in float32 (the interpreter computes bfloat16 products wrongly).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool
    source: int
    act: Activation
    epilogue: EpilogueConfig
    rows: int
    columns: int
    depth: int
    buffers: int
    precision: str = "ieee"
    upcast: bool = False

    @property
    def pointwise(self) -> bool:
        """Every tap of every pixel is inside."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def tap_step(self) -> tuple[int, int]:
        """Distance between the taps that meet the grid of a class."""
        if not self.transposed:
            return 1, 1
        return self.stride[0] // gcd(self.stride[0], self.dilation[0]), self.stride[1] // gcd(
            self.stride[1], self.dilation[1]
        )

    @property
    def classes(self) -> tuple[int, int]:
        return self.stride if self.transposed else (1, 1)

    @property
    def pixel_step(self) -> tuple[int, int]:
        """How far the source moves from one pixel of a class to the next."""
        return (1, 1) if self.transposed else self.stride


class Convolution(NamedTuple):
    """source: P or dy, [batch, source_height, source_width, channels]. weight: [K, C / groups, R, S], its strides.

    batch, height, width: of the result, [batch, height, width, groups * result_group], which the epilogue writes.
    source_group, result_group: channels per group.
    """

    source: Operand
    source_height: int
    source_width: int
    weight: Any
    weight_strides: tuple[int, int, int, int]
    batch: int
    height: int
    width: int
    groups: int
    source_group: int
    result_group: int
    epilogue: Epilogue


@triton.jit
def convolution(args, CONFIGS: tl.constexpr, INDEX: tl.constexpr):
    """Walks all tiles of one block of result channels before the next block, so that a reduction stays in registers."""
    CONFIG: tl.constexpr = CONFIGS[INDEX]
    EPILOGUE: tl.constexpr = CONFIG.epilogue
    blocks_per_group = tl.cdiv(args.result_group, CONFIG.columns)
    blocks = args.groups * blocks_per_group
    first, step, lane, lanes = share(blocks)
    for block in range(first, blocks, step):
        group = block // blocks_per_group
        column = (block % blocks_per_group) * CONFIG.columns + tl.arange(0, CONFIG.columns)
        column_mask = column < args.result_group
        channels = group * args.result_group + column
        r0, r1, r2 = zeros(CONFIG.columns, EPILOGUE.reduce, EPILOGUE.wide)
        for tile in range(lane, pixel_tiles(args, CONFIG), lanes):
            image0, image, oh, ow, class_h, class_w = locate(args, tile, CONFIG)
            h = oh * CONFIG.classes[0] + class_h
            w = ow * CONFIG.classes[1] + class_w
            row_mask = (image0 + image < args.batch) & (h < args.height) & (w < args.width)
            acc = product(args, image0, image, oh, ow, class_h, class_w, row_mask, group, column, column_mask, CONFIG)
            first_pixel = tl.cast(image0, tl.int64) * args.height * args.width
            pixels = (image * args.height + h) * args.width + w
            r0, r1, r2 = epilogue.apply(
                args.epilogue, acc, first_pixel, pixels, row_mask, channels, column_mask, r0, r1, r2, EPILOGUE
            )
        width = args.groups * args.result_group
        finish(args.epilogue.reduction, r0, r1, r2, channels, column_mask, block, lane, lanes, width, EPILOGUE)


@triton.jit
def pixel_tiles(args, CONFIG: tl.constexpr):
    """Tiles of result pixels, class by class."""
    height = tl.cdiv(args.height, CONFIG.classes[0])
    width = tl.cdiv(args.width, CONFIG.classes[1])
    return tl.cdiv(args.batch * height * width, CONFIG.rows) * (CONFIG.classes[0] * CONFIG.classes[1])


@triton.jit
def locate(args, tile, CONFIG: tl.constexpr):
    """(first image, image, h, w, row class, column class) of a tile.

    image [rows] counts from the first image, so that 32 bits are enough for every offset; h, w [rows]: the position
    within the class.
    """
    height = tl.cdiv(args.height, CONFIG.classes[0])
    width = tl.cdiv(args.width, CONFIG.classes[1])
    class_tiles = tl.cdiv(args.batch * height * width, CONFIG.rows)
    kind = tile // class_tiles
    start = (tile % class_tiles) * CONFIG.rows
    image0 = start // (height * width)
    row = start - image0 * (height * width) + tl.arange(0, CONFIG.rows)
    position = row % (height * width)
    image = row // (height * width)
    return image0, image, position // width, position % width, kind // CONFIG.classes[1], kind % CONFIG.classes[1]


@triton.jit
def product(args, image0, image, oh, ow, class_h, class_w, row_mask, group, column, column_mask, CONFIG: tl.constexpr):
    """The tile of the implicit matrix product, float32 [rows, columns]."""
    first_r, taps_r = taps(class_h, CONFIG, 0)
    first_s, taps_s = taps(class_w, CONFIG, 1)
    h0 = oh * CONFIG.pixel_step[0]
    w0 = ow * CONFIG.pixel_step[1]
    start = tl.cast(image0, tl.int64) * args.source_height * args.source_width * args.source.channels
    base = ((image * args.source_height + h0) * args.source_width + w0) * args.source.channels
    base += group * args.source_group
    weight = args.weight
    stride_k, stride_c, stride_r, stride_s = args.weight_strides
    if CONFIG.transposed:  # a step runs over k, the columns are c
        weight += group * args.source_group * stride_k
        weight += column[None, :] * stride_c
        depth_stride = stride_k
    else:
        weight += (group * args.result_group + column)[None, :] * stride_k
        depth_stride = stride_c

    depth_blocks = tl.cdiv(args.source_group, CONFIG.depth)
    ROWS: tl.constexpr = CONFIG.rows  # a tuple takes no attribute of a constant
    COLUMNS: tl.constexpr = CONFIG.columns
    ACT: tl.constexpr = CONFIG.act
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, taps_r * taps_s * depth_blocks, num_stages=CONFIG.buffers):
        if CONFIG.kernel[0] * CONFIG.kernel[1] == 1:  # keeps what is known of addresses, and so wide loads
            r, s, depth = 0, 0, step * CONFIG.depth
        else:
            tap = step // depth_blocks
            r = first_r + (tap // taps_s) * CONFIG.tap_step[0]
            s = first_s + (tap % taps_s) * CONFIG.tap_step[1]
            depth = (step % depth_blocks) * CONFIG.depth
        if CONFIG.transposed:
            shift_h = exact_quotient(class_h + CONFIG.padding[0] - r * CONFIG.dilation[0], CONFIG.stride[0])
            shift_w = exact_quotient(class_w + CONFIG.padding[1] - s * CONFIG.dilation[1], CONFIG.stride[1])
        else:
            shift_h = r * CONFIG.dilation[0] - CONFIG.padding[0]
            shift_w = s * CONFIG.dilation[1] - CONFIG.padding[1]
        inside = row_mask
        if not CONFIG.pointwise:
            h = h0 + shift_h
            w = w0 + shift_w
            inside &= (h >= 0) & (h < args.source_height) & (w >= 0) & (w < args.source_width)
        depth += tl.arange(0, CONFIG.depth)
        depth_mask = depth < args.source_group
        offsets = (base + (shift_h * args.source_width + shift_w) * args.source.channels)[:, None] + depth[None, :]
        a = operands.load(
            args.source,
            start,
            offsets,
            group * args.source_group + depth,
            depth_mask,
            inside[:, None] & depth_mask[None, :],
            CONFIG.source,
            ACT,
        ).to(args.source.x.dtype.element_ty)
        b = tl.load(
            weight + (r * stride_r + s * stride_s) + depth[:, None] * depth_stride,
            mask=depth_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        if CONFIG.upcast:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=CONFIG.precision)
    return acc


@triton.jit
def taps(position, CONFIG: tl.constexpr, AXIS: tl.constexpr):
    """(first tap, number of taps) of an axis that meet the grid of the class at `position`."""
    if CONFIG.transposed and CONFIG.stride[AXIS] > 1:
        first = CONFIG.kernel[AXIS]
        TAPS: tl.constexpr = CONFIG.kernel[AXIS]
        for back in tl.static_range(TAPS):
            tap = TAPS - 1 - back
            distance = position + CONFIG.padding[AXIS] - tap * CONFIG.dilation[AXIS]
            above = distance + CONFIG.stride[AXIS] * CONFIG.kernel[AXIS] * CONFIG.dilation[AXIS]  # % of a positive
            first = tl.where(above % CONFIG.stride[AXIS] == 0, tap, first)
        return first, (CONFIG.kernel[AXIS] - first + CONFIG.tap_step[AXIS] - 1) // CONFIG.tap_step[AXIS]
    else:
        return 0, CONFIG.kernel[AXIS]


@triton.jit
def exact_quotient(value, DIVISOR: tl.constexpr):
    """value / DIVISOR where it divides, for either sign."""
    if DIVISOR == 1:
        return value
    else:
        return tl.where(value < 0, -((-value) // DIVISOR), value // DIVISOR)
