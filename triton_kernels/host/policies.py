"""The decision how one block runs on one GPU: `backends.how` for the chip at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from resnet_fused.backends import how, measured
from resnet_fused.backends.how import Mode
from resnet_fused.spec import BlockSpec

from . import chips
from .chips import Chip
from .launch import INTERPRETED, Submit


@dataclass(frozen=True)
class Policy:
    """How a block runs. library: the convolutions (indices into spec.convs) left to the vendor's library.

    submit: receives the launches instead of the device, e.g. to compile them for another.
    precision: of float32 products, "ieee" or "tf32"; None: PyTorch's present one (`how.precision`).
    """

    chip: Chip
    mode: Mode = "single"
    library: frozenset[int] = frozenset()
    submit: Submit | None = None
    precision: str | None = None


def chip_of(x: Tensor) -> Chip:
    return chips.INTERPRETER if INTERPRETED else chips.of_device(x.device.index or 0)


def choose(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor], train: bool = True) -> Policy:
    """The policy for one call of an operator. train: forward or backward; the two were measured as one workload."""
    chip = chip_of(x)
    wish = measured.wish("triton", measured.lookup(spec, x, weights, train))
    if chip.arch == 0 and wish.library is None:
        wish = wish._replace(library="none")  # the interpreter is there to run our kernels
    chosen = how.choose(wish, spec, x, weights)
    return Policy(chip, chosen.mode, chosen.library, precision="tf32" if chosen.tf32 else "ieee")
