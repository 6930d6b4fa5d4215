"""Tile sizes: one frozen value per phase, a heuristic from shapes and chip without timing, and candidates to time.

The thresholds are derived, not measured: no GPU was at hand when they were written. They follow from two counts. First,
a tile's operands and accumulators have to fit registers and shared memory with two or more workers per multiprocessor:
a tile whose loop has only one or two steps (1x1 convolutions of few channels) can hide memory latency only behind other
workers. Second, a small activation has to give at least one tile to most multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps

import torch

from resnet_fused.backends import measured
from resnet_fused.backends.measured import TileKey

from .chips import Chip


@dataclass(frozen=True)
class Tile:
    """rows x columns: the tile of results. depth: of one step of its loop. buffers: steps in flight (num_stages).

    warps: per worker. workers: per multiprocessor. splits: of a weight gradient's pixels.
    """

    rows: int
    columns: int
    depth: int = 0
    buffers: int = 1
    warps: int = 4
    workers: int = 2
    splits: int = 1


Heuristic = Callable[..., Tile]
FIELDS = {f.name for f in fields(Tile)}
_trial: dict[TileKey, Tile] = {}
_collecting: list[dict[TileKey, Tile]] = []


def tunable(heuristic: Heuristic) -> Heuristic:
    """The tile on trial; else the one measured, if the chip is a GPU of this machine; else the heuristic's."""

    @wraps(heuristic)
    def choose(chip: Chip, dtype: torch.dtype, *shape: int) -> Tile:
        key = (chip.gpu, heuristic.__name__, str(dtype), *(int(size) for size in shape))
        found = measured.tile(key) if chip.gpu is not None else None
        known = Tile(**found) if found is not None and found.keys() == FIELDS else None
        tile = _trial.get(key) or known or heuristic(chip, dtype, *shape)
        for keys in _collecting:
            keys[key] = tile
        return tile

    return choose


@contextmanager
def trying(key: TileKey, tile: Tile) -> Iterator[None]:
    """Within, phases of this key take this tile."""
    _trial[key] = tile
    try:
        yield
    finally:
        del _trial[key]


@contextmanager
def asked() -> Iterator[dict[TileKey, Tile]]:
    """Collects the keys of the phases planned within, and the tiles they took."""
    keys: dict[TileKey, Tile] = {}
    _collecting.append(keys)
    try:
        yield keys
    finally:
        _collecting[:] = [each for each in _collecting if each is not keys]


def candidates(kind: str, tile: Tile) -> list[Tile]:
    """Neighbours of a tile worth timing: shapes, depth of the pipeline, warps, workers, splits."""
    found = []
    for rows, columns in ((1, 1), (2, 1), (1, 2), (0.5, 1), (1, 0.5), (0.5, 2), (2, 0.5)):
        shape = replace(tile, rows=int(tile.rows * rows), columns=int(tile.columns * columns))
        if shape.rows < SMALLEST or shape.columns < SMALLEST or (kind == "chained" and columns != 1):
            continue
        found += [replace(shape, warps=warps) for warps in (4, 8)]
    if tile.depth:
        found += [replace(tile, buffers=buffers) for buffers in (2, 4)]
        found += [replace(tile, depth=tile.depth // 2, buffers=4)] if tile.depth > 32 else []
    found += [replace(tile, workers=workers) for workers in (1, 2, 3, 4)]
    if tile.splits > 1:
        found += [replace(tile, splits=splits) for splits in (tile.splits // 2, tile.splits * 2)]
    return [t for t in dict.fromkeys(found) if t != tile]


SMALLEST = 16  # tl.dot takes no smaller side


def power_of_two(value: int, least: int = SMALLEST, most: int = 1 << 30) -> int:
    """The smallest power of two >= value, within [least, most]."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


@tunable
def convolution(
    chip: Chip, dtype: torch.dtype, pixels: int, result_group: int, source_group: int, groups: int, burden: int
) -> Tile:
    """pixels: of the result, all images. result_group, source_group: channels per group.

    burden: 1 for a prologue that computes its operand, plus 1 for an epilogue that reduces: each needs registers
    beside the product's. On sm_80 and sm_90 the statistics fit beside the product, on others they did not (found by
    compiling: ahead_of_time.py).
    """
    if chip.arch == 0:
        return Tile(64, 16, 32)
    wide = 2 if dtype == torch.float32 else 1  # fp32 operands take twice the space
    columns = power_of_two(result_group, most=(64 if burden else 128) // wide)
    rows, fewest = (
        64 if burden == 2 or wide == 2 else 128,
        64 if chip.arch >= 90 else 32,
    )  # wgmma and tcgen05 take no fewer than 64
    while rows > fewest and -(-pixels // rows) * (-(-result_group // columns)) * groups < chip.sms:
        rows //= 2
    depth = power_of_two(source_group, most=64 // wide)
    buffers = _buffers(chip, dtype, (rows * (1 + (burden > 0)) + columns) * depth)
    return Tile(rows, columns, depth, buffers, _warps(rows * columns, burden > 0), workers=2)


@tunable
def weight_gradient(
    chip: Chip,
    dtype: torch.dtype,
    pixels: int,
    output_group: int,
    input_group: int,
    taps: int,
    groups: int,
    heavy: bool,
) -> Tile:
    """heavy: a prologue computes its operand."""
    if chip.arch == 0:
        return Tile(16, 32, 32, splits=3 if pixels > 64 else 1)  # three: an early merge would show
    wide = 2 if dtype == torch.float32 else 1
    rows = power_of_two(output_group, most=(64 if heavy and chip.arch >= 100 else 128) // wide)
    columns = power_of_two(input_group, most=(64 if heavy else 128) // wide)
    depth = 64 // wide
    tiles = groups * taps * -(-output_group // rows) * -(-input_group // columns)
    # work for every worker, but no split shorter than 16 steps: each costs a float32 partial
    splits = max(1, min(2 * chip.sms // tiles, pixels // (16 * depth)))
    buffers = _buffers(chip, dtype, (rows * (1 + heavy) + columns) * depth)
    return Tile(rows, columns, depth, buffers, _warps(rows * columns, heavy), workers=2, splits=splits)


@tunable
def chained(chip: Chip, dtype: torch.dtype, pixels: int, middle: int, source_group: int) -> Tile:
    """Of two convolutions at once; columns cover the channels between them."""
    if chip.arch == 0:
        return Tile(64, power_of_two(middle), 32)
    wide = 2 if dtype == torch.float32 else 1
    columns = power_of_two(middle)
    depth = power_of_two(source_group, most=64 // wide)
    return Tile(64, columns, depth, _buffers(chip, dtype, (64 + columns) * depth), _warps(64 * columns, True))


def _buffers(chip: Chip, dtype: torch.dtype, values: int) -> int:
    """How many steps of `values` operands can be in flight: as many as shared memory holds, three at most.

    values: of one step; the operand of a gradient counts twice, being two tensors. 8 KiB are left for the epilogue.
    """
    step = values * (4 if dtype == torch.float32 else 2)
    return max(1, min(3, (chip.shared - 8 * 1024) // step))


def _warps(area: int, heavy: bool) -> int:
    """Warps that leave each thread 64 accumulators, or 32 where it needs registers for more than the product."""
    return 8 if area >= (64 if heavy else 128) * 128 else 4


@tunable
def pointwise(chip: Chip, dtype: torch.dtype, channels: int) -> Tile:
    if chip.arch == 0:
        return Tile(64, 16)
    columns = power_of_two(channels, most=128)
    elements = 2048 if dtype == torch.float32 else 4096
    return Tile(elements // columns, columns, warps=4, workers=4)
