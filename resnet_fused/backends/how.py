"""How a block runs on a GPU, whichever backend runs it: in how many launches, and with whose convolutions.

A backend runs a block in the way that was asked for here; else in the way that was measured to be its fastest
(`measured`); else in the way that `choose` finds by size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from resnet_fused.spec import BlockSpec

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


# What every open `with` block asks for, in the order of entering. Process-wide and not thread-local: autograd runs
# backward in a thread of its own. Blocks of several threads interleave, so each takes away its own entry when it ends.
_open: dict[object, Wish] = {}


def launch_mode(mode: Mode) -> AbstractContextManager[None]:
    """ "single" or "phased" for every block within, in all threads. The context entered last and still open counts.

    Raises ValueError for another mode.
    """
    return _asking("launch mode", mode, MODES, Wish(mode, None))


def library_convolutions(library: Library) -> AbstractContextManager[None]:
    """Leave none, those with more than one tap ("spatial"), or all convolutions to the vendor's library; as above."""
    return _asking("choice of library convolutions", library, LIBRARIES, Wish(None, library))


@contextmanager
def _asking(what: str, name: str, accepted: tuple[str, ...], wish: Wish) -> Iterator[None]:
    if name not in accepted:
        raise ValueError(f"unknown {what} {name!r}; accepted: {', '.join(map(repr, accepted))}")
    token = object()
    _open[token] = wish
    try:
        yield
    finally:
        del _open[token]


def asked() -> Wish:
    """What the context managers ask for now."""
    mode: Mode | None = None
    library: Library | None = None
    for wish in tuple(_open.values()):  # a copy: meanwhile another thread may enter or leave
        mode, library = wish.mode or mode, wish.library or library
    return Wish(mode, library)


@torch.compiler.assume_constant_result  # a graph keeps what was true when it was traced
def precision() -> Literal["ieee", "tf32"]:
    """The precision of a block's float32 products, ours and the library's: that of PyTorch's own convolution now.

    With cuDNN that is torch.backends.cudnn.conv.fp32_precision, "tf32" unless it was changed, there or by
    torch.backends.cudnn.allow_tf32. Where cuDNN is switched off, PyTorch forms convolutions as products of matrices.
    """
    cudnn = torch.backends.cudnn
    setting = cudnn.conv if cudnn.enabled else torch.backends.cuda.matmul  # type: ignore[attr-defined, unused-ignore]
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"


class How(NamedTuple):
    """The decision: how one block is divided into launches, whose convolutions it runs, and the precision of float32.

    library: the convolutions (indices into `BlockSpec.convs`) that are the vendor library's.
    """

    mode: Mode
    library: frozenset[int]
    tf32: bool


_EMPTY: frozenset[int] = frozenset()
CHOSEN = How("single", _EMPTY, False)  # where there is nothing to choose: on a CPU

# Up to this size of the activations a block is one launch. Beyond it there are several, each with its own number of
# workers, and the library's convolutions between them. Derived, not measured: every block of a ResNet-50 at 224 pixels
# stays below it at batch 32, because launches are a large part of the time there.
SINGLE_LAUNCH_BYTES = 128 << 20
# A product's tile has many channels on each side: a convolution with fewer per group would mostly multiply zeros.
FEWEST_CHANNELS = 16


def choose(wish: Wish, spec: BlockSpec, x: Tensor, weights: Sequence[Tensor]) -> How:
    """What was wished for, and the rest by size. weights: of the block's convolutions."""
    widest = max(w.shape[0] for w in weights)
    moved = x.element_size() * (x.numel() + x.numel() // x.shape[1] * widest)  # of the larger activations, roughly
    mode: Mode = wish.mode or ("single" if moved <= SINGLE_LAUNCH_BYTES else "phased")
    if wish.library is not None:
        library = _EMPTY if wish.library == "none" else spatial(weights)
        if wish.library == "all":
            library = frozenset(range(len(weights)))
    else:
        thin = frozenset(
            i
            for i, (w, stage) in enumerate(zip(weights, spec.convs, strict=True))
            if min(w.shape[0] // stage.groups, w.shape[1]) < FEWEST_CHANNELS
        )
        library = thin | (spatial(weights) if mode == "phased" else _EMPTY)
    return How(mode, library, precision() == "tf32")


def refuses_padding(kernels: str, spec: BlockSpec) -> str | None:
    """Why these kernels of a GPU do not run the block, or None: they read nothing outside a picture."""
    modes = [stage.padding_mode for stage in spec.convs if stage.pads_values]
    return f"{kernels} pad with zeros only, the block has padding_mode={modes[0]!r}" if modes else None


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
