"""How a block's phases run: one launch or several, and which convolutions are left to the vendor's library.

`choose` decides from shapes what was neither asked for (`resnet_fused.backends.how`) nor measured (`resnet_fused.backends.measured`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resnet_fused.backends import how, measured
from resnet_fused.backends.how import Library, Mode
from resnet_fused.spec import BlockSpec

from . import chips
from .launch import INTERPRETED
from .residual_block import Policy

# Below it one launch, above it one a phase, each with its own number of warps and workers. Derived, not measured: batch
# 32 of a ResNet-50 at 224 pixels is to stay below in every block, because there launches are a large part of the time.
SINGLE_LAUNCH_BYTES = 128 << 20


def chip_of(x: Tensor) -> chips.Chip:
    return chips.INTERPRETER if INTERPRETED else chips.of_device(x.device.index or 0)


def choose(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor], train: bool = True) -> Policy:
    """The policy for one call of an operator. train: forward or backward, which run as one workload was measured."""
    chip = chip_of(x)
    wish = measured.wish("triton", measured.lookup(spec, x, weights, train))
    mode = wish.mode or ("single" if _bytes(x, weights) <= SINGLE_LAUNCH_BYTES else "phased")
    return Policy(chip, mode, _left_to_library(spec, weights, chip, mode, wish.library))


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
    spatial = how.spatial(weights)
    if library == "spatial":
        return spatial
    # A product's tile has at least 16 channels a side: what has fewer a group (grouped convolutions, a picture's three)
    # would mostly multiply zeros.
    thin = frozenset(
        i
        for i, (w, s) in enumerate(zip(weights, spec.convs, strict=True))
        if min(w.shape[0] // s.groups, w.shape[1]) < 16
    )
    return thin | (spatial if mode == "phased" else frozenset())
