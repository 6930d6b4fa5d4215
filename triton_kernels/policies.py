"""How a block's phases run: one launch or several, and which convolutions are left to the vendor's library."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.spec import BlockSpec

from . import chips
from .launch import INTERPRETED
from .residual_block import Policy


def chip_of(x: Tensor) -> chips.Chip:
    return chips.INTERPRETER if INTERPRETED else chips.of_device(x.device.index or 0)


def choose(spec: BlockSpec, x: Tensor, weights: Sequence[Tensor], direction: str) -> Policy:
    mode = os.environ.get("RESNET_FUSED_LAUNCH", "single")
    return Policy(chip_of(x), "single" if mode == "single" else "phased")
