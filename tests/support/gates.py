"""Gates for the tests: a squeeze-excitation with its own weights, in any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SqueezeExcitation:
    """pooled [N, C] -> sigmoid(silu(pooled @ down) @ up) [N, C]; down: [C, R], up: [R, C]."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, channels: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> SqueezeExcitation:
        """The values are drawn in fp64 and rounded, so every dtype sees the same gate."""
        generator = torch.Generator().manual_seed(seed + 500)
        shapes = ((channels, 3), (3, channels))
        down, up = (torch.randn(*s, dtype=torch.float64, generator=generator) * s[0] ** -0.5 for s in shapes)
        return cls(down.to(dtype), up.to(dtype))

    def __call__(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(torch.nn.functional.silu(pooled @ self.down) @ self.up)

    def leaf(self, requires_grad: bool) -> SqueezeExcitation:
        return SqueezeExcitation(*(t.detach().requires_grad_(requires_grad) for t in (self.down, self.up)))

    def double(self) -> SqueezeExcitation:
        return SqueezeExcitation(self.down.double(), self.up.double())
