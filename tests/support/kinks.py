"""Pre-activations within rounding of zero, where the gradient of ReLU is a matter of rounding.

Two correct runs may put such a value on different sides of zero. One flipped mask moves a gradient by a thousand ulp
of float32 and more, and which of the two runs has it is chance, so that either may look bad beside the other. What
such flips can do is measured on the exact network itself: run it in float64 with every pre-activation near zero
taken on the other side. "Near" is in units of the rounding error (root mean square) of the run under scrutiny at
that ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RARE = 4.0  # float32: a mask or two flips in a block, and any value within four sigma may be the one
MANY = 1.0  # 16 bits: masks flip by the hundred, about as many as lie within one sigma (measured: 1.3x eager's error)
_aten = torch.ops.aten
_RELU = (_aten.relu.default, _aten.relu_.default)


class OnRelu(TorchDispatchMode):
    """Hands every input of a ReLU, numbered in the order of execution, to `visit`, which returns the one to use."""

    def __init__(self, visit: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.visit = visit
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELU:
            z = self.visit(self.calls, args[0])
            self.calls += 1
            if func is _aten.relu_.default:
                args[0].copy_(z)
            else:
                args = (z, *args[1:])
        return func(*args, **(kwargs or {}))


class Kinks:
    """Three runs of one module, in this order: `record` in `dtype`, `measure` and `flip` in float64."""

    def __init__(self, dtype: torch.dtype, sigmas: float | None = None) -> None:
        """sigmas: what "near" means; by default RARE or MANY, as fits a network in `dtype`."""
        self._sigmas = sigmas or (RARE if torch.finfo(dtype).eps < 1e-6 else MANY)
        self._recorded: list[Tensor] = []
        self._near_zero: list[float] = []

    def record(self) -> OnRelu:
        def visit(_: int, z: Tensor) -> Tensor:
            self._recorded.append(z.clone())
            return z

        return OnRelu(visit)

    def measure(self) -> OnRelu:
        def visit(call: int, z: Tensor) -> Tensor:
            rounding = (z - self._recorded[call]).square().mean().sqrt()
            self._recorded[call] = z.new_empty(0)  # no longer needed
            self._near_zero.append(self._sigmas * float(rounding))
            return z

        return OnRelu(visit)

    def flip(self) -> OnRelu:
        return OnRelu(lambda call, z: torch.where(z.abs() <= self._near_zero[call], -z, z))
