"""The two scales of a residual block (1 - beta) x + alpha g(x): how to choose them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Learnable:
    """A scale that is trained: a parameter of its block, in the block's `state_dict` under the argument's name.

    initial:     0 starts each block as its skip path: ReZero (arXiv:2003.04887), SkipInit (arXiv:2002.10444). A small
                 number with `per_channel` is LayerScale (arXiv:2103.17239), which starts at 0.1, 1e-5 or 1e-6 by depth.
    per_channel: [C_out] instead of [1].

    Raises ValueError where initial is not finite.
    """

    initial: float = 0.0
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be finite, got {self.initial!r}")

    def parameter(self, channels: int) -> nn.Parameter:
        return nn.Parameter(torch.full((channels if self.per_channel else 1,), float(self.initial)))


BlockScale = float | Learnable
ModelScale = BlockScale | Callable[[int], BlockScale]  # a function of the number of blocks


def scale_of_depth(scale: ModelScale, blocks: int) -> BlockScale:
    """What each of so many blocks gets."""
    return scale(blocks) if callable(scale) else scale


def depth_scale(blocks: int) -> float:
    """1 / sqrt(L) for L blocks in a row: the branch scale with which depth neither blows up nor loses a signal.

    With x_{l+1} = x_l + a g(x_l), and branches that are independent at initialisation and keep the mean square, the
    mean square of x_L is that of x_0 times (1 + a^2)^L: at most e for a = 1 / sqrt(L), 2^L for a = 1, and close to 1 for
    a = 1 / L, where the branches no longer count (Hayou et al., arXiv:2010.12859; Marion et al., arXiv:2206.06929).
    Fixup (arXiv:1901.09321) scales the weights of branches of m layers by L^(-1 / (2 m - 2)) instead.

    Raises ValueError unless blocks is a positive int.
    """
    if not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"blocks must be a positive int, got {blocks!r}")
    return 1 / math.sqrt(blocks)
