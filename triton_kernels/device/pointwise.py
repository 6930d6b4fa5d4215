"""The phase without a product: a pass over pixels and channels that ends in the same epilogue as a convolution.

It joins branch and skip path, masks the gradient of the output, and writes out what a library convolution reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from resnet_fused.spec import Activation

from . import epilogue, operands
from .epilogue import Epilogue, EpilogueConfig
from .operands import Operand
from .reductions import finish, share, zeros


@dataclass(frozen=True)
class PointwiseConfig:
    """source, act: as in a convolution's prologue. rows, columns: the tile."""

    source: int
    act: Activation
    epilogue: EpilogueConfig
    rows: int
    columns: int


class Pointwise(NamedTuple):
    """source: [pixels, channels]; the epilogue writes the same shape."""

    source: Operand
    pixels: int
    epilogue: Epilogue


@triton.jit
def pointwise(args, CONFIGS: tl.constexpr, INDEX: tl.constexpr):
    """Walks all tiles of one block of channels before the next block, as `convolution` does."""
    CONFIG: tl.constexpr = CONFIGS[INDEX]
    EPILOGUE: tl.constexpr = CONFIG.epilogue
    ACT: tl.constexpr = CONFIG.act
    width = args.source.channels
    blocks = tl.cdiv(width, CONFIG.columns)
    first, step, lane, lanes = share(blocks)
    for block in range(first, blocks, step):
        channels = block * CONFIG.columns + tl.arange(0, CONFIG.columns)
        channel_mask = channels < width
        r0, r1, r2 = zeros(CONFIG.columns, EPILOGUE.reduce, EPILOGUE.wide)
        for tile in range(lane, tl.cdiv(args.pixels, CONFIG.rows), lanes):
            first_pixel = tl.cast(tile * CONFIG.rows, tl.int64)
            pixels = tl.arange(0, CONFIG.rows)
            row_mask = first_pixel + pixels < args.pixels
            v = operands.load(
                args.source,
                first_pixel * width,
                pixels[:, None] * width + channels[None, :],
                channels,
                channel_mask,
                row_mask[:, None] & channel_mask[None, :],
                CONFIG.source,
                ACT,
            ).to(tl.float32)
            r0, r1, r2 = epilogue.apply(
                args.epilogue, v, first_pixel, pixels, row_mask, channels, channel_mask, r0, r1, r2, EPILOGUE
            )
        finish(args.epilogue.reduction, r0, r1, r2, channels, channel_mask, block, lane, lanes, width, EPILOGUE)
