"""Activations as values: what each computes in plain PyTorch, and what its derivative reads.

Each one is an entry of `KINDS`, in the order of the codes. csrc/block/activations.h and activation_functions.h, and
triton_kernels/device/activations.py, have an entry of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.spec.constant import constant

Reads = Literal["nothing", "output", "input"]
Formula = Callable[[Tensor, float, Tensor | None], Tensor]


@dataclass(frozen=True)
class Kind:
    """One activation.

    formula:   of the input, the parameter and, where it is learned, the slope [1] or [C].
    reads:     what backward needs: "output", where the derivative takes two values and the output tells which; then
               `out` or a bit per value is all that is kept. "input": the value before the activation, recomputed.
    modules, functions: what adapters recognise as this activation.
    accepts:   whether a module of `modules` is this one. parameter: its value where none is given; read: a module's.
    learned:   has a slope that is trained, `StageParams.slope`.
    kinks:     where the derivative jumps, so that rounding of the input decides on which side a gradient is.
    steepest:  the largest |derivative|, rounded up; a slope may be steeper (`Activation.lipschitz`).
    """

    formula: Formula
    reads: Reads
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Tensor], ...] = ()
    accepts: Callable[[Any], bool] = lambda module: True
    parameter: float = 0.0
    read: Callable[[Any], float] | None = None
    learned: bool = False
    kinks: tuple[float, ...] = ()
    steepest: float = 1.0


KINDS: dict[str, Kind] = {
    "identity": Kind(lambda z, *_: z, "nothing", (nn.Identity,)),
    "relu": Kind(
        lambda z, *_: torch.relu(z), "output", (nn.ReLU,), (F.relu, F.relu_, torch.relu, torch.relu_), kinks=(0.0,)
    ),
    "relu6": Kind(lambda z, *_: F.relu6(z), "output", (nn.ReLU6,), (F.relu6,), kinks=(0.0, 6.0)),
    "leaky_relu": Kind(
        lambda z, slope, _: F.leaky_relu(z, slope),
        "output",
        (nn.LeakyReLU,),
        (F.leaky_relu, F.leaky_relu_),
        parameter=0.01,
        read=lambda module: module.negative_slope,
        kinks=(0.0,),
    ),
    "prelu": Kind(
        lambda z, _, slope: F.prelu(z, slope),  # type: ignore[arg-type]
        "input",
        (nn.PReLU,),
        learned=True,
        kinks=(0.0,),
    ),
    "silu": Kind(lambda z, *_: F.silu(z), "input", (nn.SiLU,), (F.silu,), steepest=1.0998394),
    "hardswish": Kind(
        lambda z, *_: F.hardswish(z), "input", (nn.Hardswish,), (F.hardswish,), kinks=(-3.0, 3.0), steepest=1.5
    ),
    "hardsigmoid": Kind(
        lambda z, *_: F.hardsigmoid(z),
        "input",
        (nn.Hardsigmoid,),
        (F.hardsigmoid,),
        kinks=(-3.0, 3.0),
        steepest=0.1666667,
    ),
    "gelu": Kind(
        lambda z, *_: F.gelu(z),
        "input",
        (nn.GELU,),
        (F.gelu,),
        accepts=lambda module: module.approximate == "none",
        steepest=1.1289042,
    ),
    "gelu_tanh": Kind(
        lambda z, *_: F.gelu(z, approximate="tanh"),
        "input",
        (nn.GELU,),
        accepts=lambda module: module.approximate == "tanh",
        steepest=1.1289931,
    ),
}


@dataclass(frozen=True)
class Activation:
    """An activation with its constant.

    name:      one of `KINDS`.
    parameter: leaky_relu's slope for negative values; 0 for those without one.

    Raises ValueError for another name or a parameter that is not finite.
    """

    name: str
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"act must be one of {', '.join(map(repr, KINDS))}, got {self.name!r}")
        object.__setattr__(self, "parameter", constant(self.parameter))
        if not -float("inf") < self.parameter < float("inf"):  # true for NaN
            raise ValueError(f"the parameter of {self.name} must be finite, got {self.parameter!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Activation):
            return NotImplemented
        return self.name == other.name and constant(self.parameter) == constant(other.parameter)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def reads(self) -> Reads:
        """What backward reads. With a negative slope the output does not show the sign of the input."""
        return "input" if self.parameter < 0 else self.kind.reads

    @property
    def code(self) -> int:
        """Its place in `KINDS`, and in the enumeration of csrc/block/activations.h."""
        return list(KINDS).index(self.name)

    def lipschitz(self, slope: Tensor | None = None) -> float:
        """The largest |derivative|; slope: of prelu."""
        slopes = [self.parameter] if slope is None else slope.detach().flatten().tolist()
        return max(self.kind.steepest, *map(abs, slopes))

    def __call__(self, z: Tensor, slope: Tensor | None = None) -> Tensor:
        """act(z) in plain PyTorch; z: [N, C, H, W]; slope: of prelu, one value or [C]."""
        return self.kind.formula(z, self.parameter, None if slope is None else slope.reshape(-1).to(z.dtype))


def activation(act: Activation | str) -> Activation:
    """The value for a name, with the parameter that PyTorch's module has by default. Raises ValueError, TypeError."""
    if isinstance(act, Activation):
        return Activation(act.name, act.parameter) if torch.compiler.is_compiling() else act
    if not isinstance(act, str):
        raise TypeError(f"act must be an Activation or one of {', '.join(map(repr, KINDS))}, got {act!r}")
    return Activation(act, KINDS[act].parameter if act in KINDS else 0.0)


IDENTITY, RELU = Activation("identity"), Activation("relu")


def recognise(act: object) -> Activation | None:
    """The activation that a module, a function or a name stands for (None: identity); None where it is none of ours."""
    if act is None:
        return IDENTITY
    if isinstance(act, (Activation, str)):
        return activation(act) if isinstance(act, Activation) or act in KINDS else None
    for name, kind in KINDS.items():
        if type(act) in kind.modules and kind.accepts(act):
            return Activation(name, kind.parameter if kind.read is None else float(kind.read(act)))
        if act in kind.functions:
            return activation(name)
    return None
