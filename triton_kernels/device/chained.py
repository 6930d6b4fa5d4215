"""The phase of two convolutions at once: the second has one tap, and what the first makes never leaves the chip.

    out = epilogue(W_2 . act(conv_1(P) + bias_1))

For evaluation, where no statistics stand between the two. A worker keeps the first convolution's tile, all of its
channels, in registers, and multiplies it with the second's weights, block after block of the result's channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from resnet_fused.spec import Activation

from . import epilogue
from .activations import activate
from .convolution import Convolution, ConvolutionConfig, locate, pixel_tiles, product
from .epilogue import Epilogue, EpilogueConfig
from .operands import load_slope
from .reductions import zeros

WIDEST = 128  # channels of the first result that a worker can keep


@dataclass(frozen=True)
class ChainedConfig:
    """first: the first convolution; its columns cover all of its channels. act: between the two convolutions.

    columns: of one block of the result. epilogue: of the second convolution.
    """

    first: ConvolutionConfig
    act: Activation
    columns: int
    epilogue: EpilogueConfig


class Chained(NamedTuple):
    """first: with one group; only the bias of its epilogue is read. weight: [K, C, 1, 1] with stride_k and stride_c.

    width: K; the epilogue writes [pixels, K]. slope: a `Scale`, of an activation between the two that learns one.
    """

    first: Convolution
    weight: Any
    stride_k: int
    stride_c: int
    width: int
    epilogue: Epilogue
    slope: Any = None


@triton.jit
def chained(args, CONFIGS: tl.constexpr, INDEX: tl.constexpr):
    """Reads first's source [batch, H, W, channels], writes out [batch, height, width, K] of args.epilogue."""
    CONFIG: tl.constexpr = CONFIGS[INDEX]
    FIRST: tl.constexpr = CONFIG.first
    EPILOGUE: tl.constexpr = CONFIG.epilogue
    ACT: tl.constexpr = CONFIG.act
    NAME: tl.constexpr = ACT.name
    first = args.first
    middle = tl.arange(0, FIRST.columns)
    middle_mask = middle < first.result_group
    for tile in range(tl.program_id(0), pixel_tiles(first, FIRST), tl.num_programs(0)):
        image0, image, h, w, _, _ = locate(first, tile, FIRST)
        row_mask = image0 + image < first.batch
        p = product(first, image0, image, h, w, 0, 0, row_mask, 0, middle, middle_mask, FIRST)
        if first.epilogue.bias is not None:
            p += tl.load(first.epilogue.bias + middle, mask=middle_mask, other=0.0).to(tl.float32)[None, :]
        p = activate(p, load_slope(args.slope, middle, middle_mask, ACT), NAME)
        p = p.to(first.source.x.dtype.element_ty)
        if FIRST.upcast:
            p = p.to(tl.float32)
        first_pixel = tl.cast(image0, tl.int64) * first.height * first.width
        pixels = (image * first.height + h) * first.width + w
        for start in range(0, args.width, CONFIG.columns):
            channels = start + tl.arange(0, CONFIG.columns)
            channel_mask = channels < args.width
            b = tl.load(
                args.weight + middle[:, None] * args.stride_c + channels[None, :] * args.stride_k,
                mask=middle_mask[:, None] & channel_mask[None, :],
                other=0.0,
            )
            if FIRST.upcast:
                b = b.to(tl.float32)
            acc = tl.dot(p, b, input_precision=FIRST.precision)
            r0, r1, r2 = zeros(CONFIG.columns, EPILOGUE.reduce, EPILOGUE.wide)
            epilogue.apply(
                args.epilogue, acc, first_pixel, pixels, row_mask, channels, channel_mask, r0, r1, r2, EPILOGUE
            )
