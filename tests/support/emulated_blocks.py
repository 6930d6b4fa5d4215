"""Blocks of channels that the CUDA kernels multiply themselves: multiples of 8."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from support.blocks import Case
from support.blocks import block as any_block

# Products read 8 channels at a time; convolutions of other widths are the library's, with our passes around them.
block = partial(any_block, channels=8, width=8)


def eightfold(case: Case) -> Case:
    return replace(case, channels=8 * case.channels, widths=tuple(8 * width for width in case.widths))
