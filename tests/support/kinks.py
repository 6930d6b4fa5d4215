"""Pre-activations within rounding of a kink, where the gradient of the activation is a matter of rounding.

Two correct runs may put such a value on different sides of it: zero for ReLU. One flipped mask moves a gradient by a
thousand ulp of float32 and more, and which of the two runs has it is chance, so that either may look bad beside the
other. What such flips can do is measured on the exact network itself: run it in float64 with every pre-activation near
a kink taken on the other side. "Near" is in units of the rounding error (root mean square) of the run under scrutiny at
that activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_fused.spec.activations import KINDS

RARE = 4.0  # float32: a mask or two flips in a block, and any value within four sigma may be the one
MANY = 1.0  # 16 bits: masks flip by the hundred, about as many as lie within one sigma (measured: 1.3x eager's error)
# Kinks beside zero, where few values are and the rounding of each is several times the mean, flip one at most.
_KINKS = {function: kind.kinks for kind in KINDS.values() for function in kind.functions if kind.kinks}
_KINKS[F.hardtanh] = KINDS["relu6"].kinks  # what nn.ReLU6 calls
_KINKS[torch.prelu] = KINDS["prelu"].kinks  # no adapter takes it for an activation, since its slope comes along

Visit = Callable[[int, Tensor, tuple[float, ...]], Tensor]  # the call's number, its input, the kinks


class OnKinked(TorchFunctionMode):
    """Hands every input of a kinked activation, numbered in the order of execution, to `visit`.

    The activation goes on with what it returns, of the same gradient.
    """

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self.visit = visit
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KINKS:
            z = args[0].detach()
            moved = self.visit(self.calls, z, _KINKS[func])
            self.calls += 1
            if moved is not z:
                args = (args[0] + (moved - z), *args[1:])
        return func(*args, **(kwargs or {}))


class Kinks:
    """Three runs of one module, in this order: `record` in `dtype`, `measure` and `flip` in float64."""

    def __init__(self, dtype: torch.dtype, sigmas: float | None = None) -> None:
        """sigmas: what "near" means; by default RARE or MANY, as fits a network in `dtype`."""
        self._sigmas = sigmas or (RARE if torch.finfo(dtype).eps < 1e-6 else MANY)
        self._recorded: list[Tensor] = []
        self._rounding: list[float] = []

    def record(self) -> OnKinked:
        def visit(_: int, z: Tensor, __: tuple[float, ...]) -> Tensor:
            self._recorded.append(z.clone())
            return z

        return OnKinked(visit)

    def measure(self) -> OnKinked:
        def visit(call: int, z: Tensor, _: tuple[float, ...]) -> Tensor:
            rounding = (z - self._recorded[call]).square().mean().sqrt()
            self._recorded[call] = z.new_empty(0)  # no longer needed
            self._rounding.append(float(rounding))
            return z

        return OnKinked(visit)

    def flip(self) -> OnKinked:
        def visit(call: int, z: Tensor, kinks: tuple[float, ...]) -> Tensor:
            for kink in kinks:
                near = self._rounding[call] * (RARE if kink else self._sigmas)
                z = torch.where((z - kink).abs() <= near, 2 * kink - z, z)
            return z

        return OnKinked(visit)
