"""How a block runs on a GPU, whichever backend runs it: in how many launches, and with whose convolutions.

A backend runs a block as was asked for here, else as was measured to be its fastest way (`resnet_fused.measured`),
else as it chooses by size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["single", "phased"]  # one launch between two convolutions of the library's, or one for each phase
Library = Literal["none", "spatial", "all"]  # which convolutions are the vendor library's: spatial have several taps

MODES: tuple[Mode, ...] = ("single", "phased")
LIBRARIES: tuple[Library, ...] = ("none", "spatial", "all")


class Way(NamedTuple):
    mode: Mode
    library: Library


class Wish(NamedTuple):
    """None: as the backend chooses."""

    mode: Mode | None
    library: Library | None


@dataclass
class _Asked:
    """Process-wide and not thread-local: autograd runs backward in a thread of its own."""

    mode: Mode | None = None
    library: Library | None = None


_asked = _Asked()


@contextmanager
def launch_mode(mode: Mode) -> Iterator[None]:
    """ "single" or "phased" for every block within, in all threads."""
    before, _asked.mode = _asked.mode, mode
    try:
        yield
    finally:
        _asked.mode = before


@contextmanager
def library_convolutions(library: Library) -> Iterator[None]:
    """Leave none, those with more than one tap, or all convolutions to the vendor's library, in all threads."""
    before, _asked.library = _asked.library, library
    try:
        yield
    finally:
        _asked.library = before


def asked() -> Wish:
    """What the context managers ask for now."""
    return Wish(_asked.mode, _asked.library)


def precision() -> Literal["ieee", "tf32"]:
    """Of float32 products, as torch.backends.cuda.matmul says."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def encode(wish: Wish) -> int:
    """`how` of `BlockSpec.encode`, with the precision of now; csrc/block_spec.h decodes it (struct How)."""
    launch = 0 if wish.mode is None else 1 + MODES.index(wish.mode)
    library = 0 if wish.library is None else 1 + LIBRARIES.index(wish.library)
    return launch | library << 2 | (precision() == "tf32") << 4


def spatial(weights: Sequence[Tensor]) -> frozenset[int]:
    """The convolutions with more than one tap."""
    return frozenset(i for i, w in enumerate(weights) if w.shape[2] * w.shape[3] > 1)


def ways(weights: Sequence[Tensor], always: frozenset[int] = frozenset()) -> list[Way]:
    """Every way to run a block of these convolution weights that differs from the others.

    always: the convolutions that the backend leaves to the library in any case.
    """
    left = {"none": always, "spatial": always | spatial(weights), "all": frozenset(range(len(weights)))}
    libraries = [lib for i, lib in enumerate(LIBRARIES) if left[lib] not in [left[b] for b in LIBRARIES[:i]]]
    return [Way(mode, library) for mode in MODES for library in libraries]
