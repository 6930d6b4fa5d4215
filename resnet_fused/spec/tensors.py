"""One value for each tensor of a block: the tensors themselves, which gradients are wanted, the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

# In the order of the operators' arguments, which is that of `flat`; csrc/block/tensors.h has the same.
SINGLE = ("x", "branch_scale", "skip_scale")
PER_CONVOLUTION = (
    "weights",
    "biases",
    "norm_weights",
    "norm_biases",
    "running_means",
    "running_vars",
    "slopes",
)


def convolution_places(convs: int) -> range:
    """Where in `BlockTensors.flat` the weights and biases of that many convolutions are."""
    return range(len(SINGLE), len(SINGLE) + 2 * convs)


@dataclass
class BlockTensors(Generic[T]):
    """Lists have one entry for each convolution, in the order of `BlockSpec.convs`.

    A norm's vectors are listed under the stage that owns the norm. slopes: of activations that learn one.
    """

    x: T
    branch_scale: T
    skip_scale: T
    weights: list[T]
    biases: list[T]
    norm_weights: list[T]
    norm_biases: list[T]
    running_means: list[T]
    running_vars: list[T]
    slopes: list[T]

    @classmethod
    def of(cls, flat: list[T]) -> BlockTensors[T]:
        """The inverse of `flat`."""
        count, rest = divmod(len(flat) - len(SINGLE), len(PER_CONVOLUTION))
        if rest or count < 1:
            raise ValueError(
                f"a block of k convolutions has {len(SINGLE)} + {len(PER_CONVOLUTION)} k tensors, got {len(flat)}"
            )
        lists = [flat[start : start + count] for start in range(len(SINGLE), len(flat), count)]
        return cls(flat[0], flat[1], flat[2], *lists)

    @classmethod
    def filled(cls, value: T, convs: int) -> BlockTensors[T]:
        """`value` everywhere, for `convs` convolutions."""
        return cls.of([value] * (len(SINGLE) + convs * len(PER_CONVOLUTION)))

    @property
    def arguments(self) -> tuple[T | list[T], ...]:
        """As the operators take them."""
        return (
            self.x,
            self.branch_scale,
            self.skip_scale,
            self.weights,
            self.biases,
            self.norm_weights,
            self.norm_biases,
            self.running_means,
            self.running_vars,
            self.slopes,
        )

    @property
    def flat(self) -> list[T]:
        """Every value, in the order of `arguments`."""
        return [
            self.x,
            self.branch_scale,
            self.skip_scale,
            *self.weights,
            *self.biases,
            *self.norm_weights,
            *self.norm_biases,
            *self.running_means,
            *self.running_vars,
            *self.slopes,
        ]

    def map(self, change: Callable[[T], U]) -> BlockTensors[U]:
        return BlockTensors.of([change(value) for value in self.flat])
