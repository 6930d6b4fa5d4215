"""How a block's phases run: one launch or several, and which convolutions are left to the vendor's library.

`choose` decides from shapes; what `tune` has measured on this device wins over it, and `launch_mode` and
`library_convolutions` over both, for tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from resnet_fused.spec import BlockSpec

from . import chips, measured
from .launch import INTERPRETED
from .measured import Library, Mode
from .residual_block import Policy

# Below it one launch, above it one a phase, each with its own number of warps and workers. Derived, not measured: batch
# 32 of a ResNet-50 at 224 pixels is to stay below in every block, because there launches are a large part of the time.
SINGLE_LAUNCH_BYTES = 128 << 20


@dataclass
class _Forced:
    """Process-wide and not thread-local: autograd runs backward in a thread of its own."""

    mode: Mode | None = None
    library: Library | None = None


_forced = _Forced()


@contextmanager
def launch_mode(mode: Mode) -> Iterator[None]:
    """ "single" or "phased" for every block within, in all threads."""
    before, _forced.mode = _forced.mode, mode
    try:
        yield
    finally:
        _forced.mode = before


@contextmanager
def library_convolutions(library: Library) -> Iterator[None]:
    """Leave none, those with more than one tap, or all convolutions to the vendor's library, in all threads."""
    before, _forced.library = _forced.library, library
    try:
        yield
    finally:
        _forced.library = before


def chip_of(x: Tensor) -> chips.Chip:
    return chips.INTERPRETER if INTERPRETED else chips.of_device(x.device.index or 0)


def choose(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor]) -> Policy:
    """The policy for one call of an operator."""
    chip = chip_of(x)
    mode: Mode = "single" if _bytes(x, weights) <= SINGLE_LAUNCH_BYTES else "phased"
    library: Library | None = None
    widths = tuple(w.shape[0] for w in weights)
    found = measured.decision(spec.batch_stats, tuple(spec.encode()[0]), tuple(x.shape), str(x.dtype), widths)
    if found is not None:
        mode, library = found.mode, found.library
    mode, library = _forced.mode or mode, _forced.library or library
    return Policy(chip, mode, _left_to_library(spec, weights, chip, mode, library))


def _bytes(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Of the larger activations, roughly: the block's input and as many pixels of its widest convolution."""
    widest = max(w.shape[0] for w in weights)
    return x.element_size() * (x.numel() + x.numel() // x.shape[1] * widest)


def _left_to_library(
    spec: BlockSpec, weights: Sequence[Tensor], chip: chips.Chip, mode: Mode, library: Library | None
) -> frozenset[int]:
    if library is None and chip.arch == 0:
        library = "none"
    if library == "none":
        return frozenset()
    if library == "all":
        return frozenset(range(len(weights)))
    spatial = {i for i, w in enumerate(weights) if w.shape[2] * w.shape[3] > 1}
    if library == "spatial":
        return frozenset(spatial)
    # A product's tile has at least 16 channels a side: what has fewer a group (grouped convolutions, a picture's three)
    # would mostly multiply zeros.
    thin = {
        i
        for i, (w, s) in enumerate(zip(weights, spec.convs, strict=True))
        if min(w.shape[0] // s.groups, w.shape[1]) < 16
    }
    return frozenset(thin | (spatial if mode == "phased" else set()))
