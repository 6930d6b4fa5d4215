"""Per-channel statistics and gradient sums: gathered in registers over a worker's tiles, merged in a fixed order.

Sums of float32 activations are kept in float64, as PyTorch's CPU kernels keep them, where the chip has doubles at half
its float32 rate (`Chip.doubles`); sums of 16-bit activations, and on other chips, in float32.

A worker keeps three values per channel while it walks its tiles, writes them once as its partial, and takes a ticket.
The worker that arrives last for a block of channels merges all partials in the order of their lanes, so results are the
same, bit for bit, in every run. It then derives every per-channel value that later phases read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .barriers import arrives_last
from .operands import Scale, load_scale

NONE = tl.constexpr(0)
STATISTICS = tl.constexpr(1)  # (count, mean, M2) of v
SUMS = tl.constexpr(2)  # (sum v, sum v (y - center), a third sum: epilogue.OVER_SKIP and so on)

MERGED = tl.constexpr(1024)  # values merged at a time: more would take registers from every phase


class Norm(NamedTuple):
    """A normalisation's tensors [C]: statistics (biased variance), affine parameters or None, eps."""

    mean: Any = None
    var: Any = None
    gamma: Any = None
    beta: Any = None
    eps: float = 0.0


class VectorGradients(NamedTuple):
    """What follows from the sums for one value v = factor * norm(y) of the join, or for an inner norm.

    table: float32 [GRADIENT_ROWS, C], the coefficients of dy (operands.GRADIENT). The rest: [C] in their parameters'
    dtypes, or None; dfactor: float64 [C].
    """

    norm: Norm = Norm()
    factor: Scale = Scale()
    table: Any = None
    dgamma: Any = None
    dbeta: Any = None
    dfactor: Any = None
    dbias: Any = None


class Reduction(NamedTuple):
    """What a reduction works in, and what it writes.

    partials: [lanes, 3, C], float64 where sums are wide, else float32. tickets: int32, one per block of channels, zero.
    rows: values per channel.
    STATISTICS writes mean and biased variance to stats [2, C] and the norm's table (operands.py).
    SUMS writes what `first` (for y) and `second` (for the third sum) ask for. Where the third sum is not the skip
    path's, only second.dfactor is asked for; without a norm that is the sum itself.
    """

    partials: Any = None
    tickets: Any = None
    rows: float = 0.0
    norm: Norm = Norm()
    stats: Any = None
    table: Any = None
    first: VectorGradients = VectorGradients()
    second: VectorGradients = VectorGradients()


@triton.jit
def share(blocks):
    """(first, step, lane, lanes): a worker takes every step-th block of channels from `first` on, and of each block's
    tiles every lanes-th from `lane` on. Workers left over after the last whole lane get no block.

    Neighbouring workers have the blocks of the same pixels, which they then find in the cache.
    """
    step = tl.minimum(blocks, tl.num_programs(0))
    lanes = tl.num_programs(0) // step
    lane = tl.program_id(0) // step
    return tl.where(lane < lanes, tl.program_id(0) % step, blocks), step, lane, lanes


@triton.jit
def zeros(N: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr):
    """The running values of N channels; the count of STATISTICS is one for all. WIDE: in float64."""
    zero = tl.zeros((N,), tl.float64 if WIDE else tl.float32)
    return 0.0 if KIND == STATISTICS else zero, zero, zero


@triton.jit
def add_tile(count, mean, m2, v, row_mask):
    """(count, mean, M2) with the rows of v [rows, N]: two passes within the tile, Chan's formula between tiles."""
    rows = tl.sum(row_mask.to(tl.float32), 0)
    divisor = tl.maximum(rows, 1.0)
    tile_mean = tl.sum(tl.where(row_mask[:, None], v, 0.0), 0) / divisor
    d = tl.where(row_mask[:, None], v - tile_mean[None, :], 0.0)
    total = tl.maximum(count + rows, 1.0)
    delta = tile_mean - mean
    return count + rows, mean + delta * (rows / total), m2 + tl.sum(d * d, 0) + delta * delta * (count * rows / total)


@triton.jit
def finish(reduction, r0, r1, r2, channels, channel_mask, block, lane, lanes, width, EPILOGUE: tl.constexpr):
    """Writes the worker's partial; the last of a channel block's `lanes` workers merges them. width: all channels."""
    if EPILOGUE.reduce != NONE:
        partial = reduction.partials + lane * 3 * width + channels
        tl.store(partial, tl.zeros_like(r1) + r0, mask=channel_mask)
        tl.store(partial + width, r1, mask=channel_mask)
        tl.store(partial + 2 * width, r2, mask=channel_mask)
        if arrives_last(reduction.tickets + block, lanes):
            if EPILOGUE.reduce == STATISTICS:
                merge_statistics(reduction, channels, channel_mask, lanes, width)
            else:
                merge_sums(reduction, channels, channel_mask, lanes, width, EPILOGUE.batch, EPILOGUE.batch_s)


@triton.jit
def load_partials(reduction, row, start, channels, channel_mask, lanes, width):
    """Row `row` of some partials from lane `start`: [MERGED / N, N], zero beyond the last."""
    lane = start + tl.arange(0, MERGED // channels.shape[0])
    pointers = reduction.partials + (lane[:, None] * 3 + row) * width + channels[None, :]
    return tl.load(pointers, mask=(lane < lanes)[:, None] & channel_mask[None, :], other=0.0)


@triton.jit
def merge_statistics(reduction, channels, channel_mask, lanes, width):
    """Reads the partials [lanes, 3, width] of `channels` [N]; writes stats [2, width] and the norm's table."""
    total = tl.zeros(channels.shape, reduction.partials.dtype.element_ty)
    for start in range(0, lanes, MERGED // channels.shape[0]):
        count = load_partials(reduction, 0, start, channels, channel_mask, lanes, width)
        total += tl.sum(count * load_partials(reduction, 1, start, channels, channel_mask, lanes, width), 0)
    rows = reduction.rows
    mean = total / rows
    m2 = tl.zeros_like(total)
    for start in range(0, lanes, MERGED // channels.shape[0]):
        count = load_partials(reduction, 0, start, channels, channel_mask, lanes, width)
        d = load_partials(reduction, 1, start, channels, channel_mask, lanes, width) - mean[None, :]
        within = load_partials(reduction, 2, start, channels, channel_mask, lanes, width)
        m2 += tl.sum(within + count * d * d, 0)
    mean = mean.to(tl.float32)
    var = (m2 / rows).to(tl.float32)
    tl.store(reduction.stats + channels, mean, mask=channel_mask)
    tl.store(reduction.stats + width + channels, var, mask=channel_mask)
    store_table(reduction.table, mean, var, reduction.norm, channels, channel_mask, width)


@triton.jit
def inverse_std(var, norm):
    """float64 [N]; vectors are few, so they are computed wide and rounded once."""
    return 1.0 / tl.sqrt(var.to(tl.float64) + norm.eps)


@triton.jit
def load_affine(norm, channels, channel_mask):
    """(gamma, beta), 1 and 0 where absent."""
    gamma = tl.full(channels.shape, 1.0, tl.float32)
    beta = tl.zeros(channels.shape, tl.float32)
    if norm.gamma is not None:
        gamma = tl.load(norm.gamma + channels, mask=channel_mask, other=0.0).to(tl.float32)
    if norm.beta is not None:
        beta = tl.load(norm.beta + channels, mask=channel_mask, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def store_table(table, mean, var, norm, channels, channel_mask, width):
    """Writes the columns `channels` [N] of a norm's table, float32 [NORM_ROWS, width]; mean, var: [N]."""
    gamma, beta = load_affine(norm, channels, channel_mask)
    scale = gamma * inverse_std(var, norm)
    store_as(table, scale, channels, channel_mask)
    store_as(table + width, beta, channels, channel_mask)
    store_as(table + 2 * width, mean, channels, channel_mask)
    store_as(table + 3 * width, beta - scale * mean, channels, channel_mask)


@triton.jit
def merge_sums(reduction, channels, channel_mask, lanes, width, BATCH: tl.constexpr, BATCH_S: tl.constexpr):
    """Reads the partials [lanes, 3, width] of `channels` [N]; writes what `first` and `second` ask for."""
    dz = tl.zeros(channels.shape, reduction.partials.dtype.element_ty)
    dz_y = tl.zeros_like(dz)
    third = tl.zeros_like(dz)
    for start in range(0, lanes, MERGED // channels.shape[0]):
        dz += tl.sum(load_partials(reduction, 0, start, channels, channel_mask, lanes, width), 0)
        dz_y += tl.sum(load_partials(reduction, 1, start, channels, channel_mask, lanes, width), 0)
        third += tl.sum(load_partials(reduction, 2, start, channels, channel_mask, lanes, width), 0)
    rows = reduction.rows
    store_gradients(reduction.first, dz, dz_y, rows, channels, channel_mask, width, BATCH)
    store_gradients(reduction.second, dz, third, rows, channels, channel_mask, width, BATCH_S)


@triton.jit
def store_gradients(gradients, dz, dz_y, rows, channels, channel_mask, width, BATCH: tl.constexpr):
    """From sum dz and sum dz (y - center) to everything per channel (Ioffe & Szegedy 2015, arXiv:1502.03167).

    dy = factor * scale * (dz - mean(dz) - y_hat * mean(dz y_hat)), the means only for batch statistics.
    """
    norm = gradients.norm
    factor = tl.full(channels.shape, 1.0, tl.float32)
    if gradients.factor.value is not None:
        factor = load_scale(gradients.factor, channels, channel_mask)
    scale = tl.full(channels.shape, 1.0, tl.float64)
    shift = tl.zeros(channels.shape, tl.float32)
    center = tl.zeros(channels.shape, tl.float32)
    inv = tl.full(channels.shape, 1.0, tl.float64)
    if norm.mean is not None:
        center = tl.load(norm.mean + channels, mask=channel_mask, other=0.0).to(tl.float32)
        inv = inverse_std(tl.load(norm.var + channels, mask=channel_mask, other=1.0).to(tl.float32), norm)
        gamma, shift = load_affine(norm, channels, channel_mask)
        scale = gamma * inv
    k_dz = factor * scale
    if gradients.table is not None:
        k_y = tl.zeros(channels.shape, tl.float64)
        k = tl.zeros(channels.shape, tl.float64)
        if BATCH:
            k_y = -k_dz * inv * inv * dz_y / rows
            k = -k_dz * dz / rows
        store_as(gradients.table, k_dz, channels, channel_mask)
        store_as(gradients.table + width, k_y, channels, channel_mask)
        store_as(gradients.table + 2 * width, k, channels, channel_mask)
        store_as(gradients.table + 3 * width, center, channels, channel_mask)
        store_as(gradients.table + 4 * width, k - k_y * center, channels, channel_mask)
    if gradients.dgamma is not None:
        store_as(gradients.dgamma, factor * inv * dz_y, channels, channel_mask)
    if gradients.dbeta is not None:
        store_as(gradients.dbeta, factor * dz, channels, channel_mask)
    if gradients.dfactor is not None:
        store_as(gradients.dfactor, scale * dz_y + shift * dz, channels, channel_mask)
    if gradients.dbias is not None:  # batch statistics take away what a bias adds
        store_as(gradients.dbias, tl.zeros(channels.shape, tl.float64) if BATCH else k_dz * dz, channels, channel_mask)


@triton.jit
def store_as(pointer, value, channels, channel_mask):
    """Writes value [N] to `channels` of a vector, in its dtype."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)  # the interpreter makes NaN of a float64 on its way to bfloat16
    tl.store(pointer + channels, value.to(pointer.dtype.element_ty), mask=channel_mask)


class Tables(NamedTuple):
    """Norms whose tables no reduction of the same launch writes. tables: [NORM_ROWS, C] of each; channels: its C."""

    norms: tuple[Norm, ...]
    tables: tuple[Any, ...]
    channels: tuple[int, ...]


@triton.jit
def write_tables(args, BLOCK: tl.constexpr):
    """Reads the vectors [C] of each norm, writes its table [NORM_ROWS, C], BLOCK channels at a time."""
    for i in tl.static_range(len(args.tables)):
        norm = args.norms[i]
        width = args.channels[i]
        for block in range(tl.program_id(0), tl.cdiv(width, BLOCK), tl.num_programs(0)):
            channels = block * BLOCK + tl.arange(0, BLOCK)
            channel_mask = channels < width
            mean = tl.load(norm.mean + channels, mask=channel_mask, other=0.0).to(tl.float32)
            var = tl.load(norm.var + channels, mask=channel_mask, other=1.0).to(tl.float32)
            store_table(args.tables[i], mean, var, norm, channels, channel_mask, width)
