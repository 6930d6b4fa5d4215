"""Channels, pixels and shared memory that tiles do and do not fit: several workers, splits, depths of the pipeline."""

from __future__ import annotations

import pytest
import torch
from support.blocks import bottleneck
from support.emulated_blocks import block
from support.emulated_checks import FEW, LARGE, SMALL, Checks, modes
from support.launch_lines import workers


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "width"), [(3, 5), (6, 8), (8, 24), (16, 8), (40, 16)])
def test_channels(channels: int, width: int, dtype: torch.dtype, mode: str, check: Checks) -> None:
    """Rows that can be read 16 bytes at a time and rows that cannot."""
    device = SMALL if mode == "single" else LARGE
    check.trains(bottleneck("identity", channels=channels, width=width), mode, dtype, device=device)
    check.trains(block(1, "none", channels=width, out_channels=channels), mode, dtype, device=device)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, SMALL), (torch.bfloat16, LARGE)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("channels", "width"), [(8, 136), (136, 8), (24, 72), (72, 16)])
def test_wide_channels(channels: int, width: int, dtype: torch.dtype, device: tuple[int, int], check: Checks) -> None:
    """More than a tile's columns, and more than a step's depth."""
    check.trains(bottleneck("identity", channels=channels, width=width), dtype=dtype, seeds=FEW, device=device)


@pytest.mark.parametrize(
    ("dtype", "processors", "count"),
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 3, 5),
        (torch.bfloat16, 64, 1),
        (torch.bfloat16, 64, 5),
        (torch.float32, 64, 3),
    ],
)
def test_many_tiles(dtype: torch.dtype, processors: int, count: int, check: Checks) -> None:
    """Several tiles per worker, several workers per channel, and weight gradients in splits: all that is merged."""
    case = bottleneck("projection", channels=72, width=8, stride=1, size=(23, 23))
    launched = check.trains(case, dtype=dtype, seeds=FEW, device=(processors, count))
    assert workers(launched) == count and all("cooperative" in line for line in launched)
    tile, splits = (128, 1) if processors < 4 else (64, 4 if dtype == torch.float32 else 2)
    for phase in (f"convolution of {tile} rows", f"data gradient of {tile} rows", f"{splits} splits"):
        assert any(phase in line for line in launched), (phase, launched)


@pytest.mark.parametrize("processors", [1, 64])
def test_wide_and_narrow_blocks_of_channels(processors: int, check: Checks) -> None:
    """More blocks of channels than workers, so that each takes several, and fewer."""
    case = block(2, "projection", channels=8, width=200, out_channels=264, kernel=1, stride=2, size=(9, 8))
    for count in (1, 2, 3, 7):
        check.trains(case, dtype=torch.bfloat16, seeds=FEW, device=(processors, count))


@pytest.mark.parametrize(
    ("dtype", "shared_memory", "buffers"),
    [
        (torch.float32, 84, 4),
        (torch.float32, 62, 3),
        (torch.bfloat16, 76, 4),
        (torch.bfloat16, 62, 3),
    ],
)
def test_depths_of_the_pipeline(dtype: torch.dtype, shared_memory: int, buffers: int, check: Checks) -> None:
    """Copies that run two or three steps ahead of the products; one, where what dy is made of takes the room."""
    case = bottleneck("projection", channels=72, width=24)
    launched = check.trains(case, dtype=dtype, seeds=FEW, device=LARGE, shared_memory=shared_memory)
    assert all(f"convolution of 64 rows, {buffers} buffers" in line for line in launched[::2]), launched
    assert all(f"gradient of 64 rows, {buffers - 1} buffers" in line for line in launched[1::2]), launched
    launched = [check.evaluates(case, dtype=dtype, device=LARGE, shared_memory=shared_memory)]
    assert all(f"convolution of 64 rows, {buffers} buffers" in line for line in launched), launched
