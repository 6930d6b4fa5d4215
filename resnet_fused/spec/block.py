"""What a residual block computes, as frozen, hashable values.

A block is a chain of stages plus a skip path::

    post-activation (ResNet v1):  P_1 = x,                P_{i+1} = act_i(norm_i(conv_i(P_i)))
                                  out = act_n(branch_scale * norm_n(conv_n(P_n)) + skip_scale * S)
                                  S   = x   or   norm_s(conv_s(x))

    branch activation (YOLO):     out = branch_scale * act_n(norm_n(conv_n(P_n))) + skip_scale * S,  S as above

    pre-activation  (ResNet v2):  P_i = act_i(norm_i(u_i)),   u_1 = x,   u_{i+1} = conv_i(P_i)
                                  out = branch_scale * u_{n+1} + skip_scale * S
                                  S   = x   or   conv_s(P_1)

Post-activation is He et al. 2015 (arXiv:1512.03385), pre-activation He et al. 2016 (arXiv:1603.05027),
whose projection reads the activated input and has no normalisation; the branch activation is that of the bottlenecks of
Redmon & Farhadi 2018 (arXiv:1804.02767).

A spec holds no tensor and knows no module. `spec.facts` has what follows from it for the backends.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from resnet_fused.spec.activations import IDENTITY, Activation, activation
from resnet_fused.spec.constant import constant

Order = Literal["post", "pre", "branch"]
Skip = Literal["none", "identity", "projection"]
Memory = Literal["default", "low"]
PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]
IntPair = tuple[int, int]

ORDERS: tuple[Order, ...] = ("post", "pre", "branch")
SKIPS: tuple[Skip, ...] = ("none", "identity", "projection")
PADDING_MODES: tuple[PaddingMode, ...] = ("zeros", "circular", "reflect", "replicate")


def _pair(name: str, value: int | tuple[int, int] | list[int], minimum: int) -> IntPair:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= minimum for v in pair):
        raise ValueError(f"{name} must be an int or a pair of ints >= {minimum}, got {value!r}")
    return pair[0], pair[1]


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


@dataclass(frozen=True)
class StageSpec:
    """One convolution with its normalisation and activation.

    stride, padding, dilation: int or (height, width).
    norm:        whether the stage has a BatchNorm at all.
    batch_stats: normalise with the batch's statistics (training) rather than the running ones.
    eps:         added to the variance, as in ``nn.BatchNorm2d``.
    act:         applied after the normalisation; in post order the last stage's applies after the residual addition.
                 An `Activation` or its name, see `spec.activations.KINDS`.
    padding_mode: what the padding holds, as in ``nn.Conv2d``; it surrounds what the convolution reads, so behind the
                 norm and activation before it, and never the skip path.
    promotes:    under autocast the norm's result has the wider dtype of its input and its tensors, as the expression of
                 FrozenBatchNorm2d; nn.BatchNorm2d's has its input's.

    Raises ValueError for a value out of range.
    """

    stride: int | IntPair = 1
    padding: int | IntPair = 0
    dilation: int | IntPair = 1
    groups: int = 1
    norm: bool = True
    batch_stats: bool = True
    eps: float = 1e-5
    act: Activation | str = "relu"
    padding_mode: PaddingMode = "zeros"
    promotes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", _pair("stride", self.stride, 1))
        object.__setattr__(self, "padding", _pair("padding", self.padding, 0))
        object.__setattr__(self, "dilation", _pair("dilation", self.dilation, 1))
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups must be a positive int, got {self.groups!r}")
        object.__setattr__(self, "eps", constant(self.eps))
        if not 0 <= self.eps < float("inf"):  # false for NaN
            raise ValueError(f"eps must be a finite number >= 0, got {self.eps!r}")
        object.__setattr__(self, "act", activation(self.act))
        _one_of("padding_mode", self.padding_mode, PADDING_MODES)

    @property
    def activation(self) -> Activation:
        return self.act  # type: ignore[return-value]

    @property
    def processes(self) -> bool:
        """Whether its norm or its activation changes anything."""
        return self.norm or self.activation.name != "identity"

    @property
    def pads_values(self) -> bool:
        """Whether the padding holds values of the input."""
        return self.padding_mode != "zeros" and self.padding != (0, 0)

    def output_size(self, size: IntPair, kernel: IntPair) -> IntPair:
        """(H, W) of the convolution's output for an input of `size` and a kernel of `kernel`."""
        (sh, sw), (ph, pw), (dh, dw) = self.geometry
        height = (size[0] + 2 * ph - dh * (kernel[0] - 1) - 1) // sh + 1
        return height, (size[1] + 2 * pw - dw * (kernel[1] - 1) - 1) // sw + 1

    @property
    def geometry(self) -> tuple[IntPair, IntPair, IntPair]:
        """(stride, padding, dilation), each (height, width)."""
        return self.stride, self.padding, self.dilation  # type: ignore[return-value]


@dataclass(frozen=True)
class BlockSpec:
    """A chain of stages and its skip path; see the module's formula.

    stages:     conv/norm/act triples in the order in which the data meets them.
    skip:       "none" (a plain chain, e.g. the stem), "identity" or "projection".
    projection: the skip path's stage; given exactly when skip is "projection".
    order:      "post", "pre" or "branch" activation.
    in_place_add: the sum is ``branch += skip``, as in torchvision and timm: under autocast, or with parameters that
                widen the skip path, it keeps the branch's dtype where ``branch + skip`` takes the wider one.
    memory:     what is kept for backward: "default" the convolution outputs. "low" computes again those of the last
                stage and of the projection, and the first one's where the second convolution strides and it does not.

    Raises ValueError for parts that do not fit together.
    """

    stages: tuple[StageSpec, ...]
    skip: Skip = "none"
    projection: StageSpec | None = None
    order: Order = "post"
    memory: Memory = "default"
    in_place_add: bool = False
    # every stage that holds a convolution: the chain, then the projection
    convs: tuple[StageSpec, ...] = field(init=False, repr=False, compare=False)
    # whether any normalisation uses the batch's statistics
    batch_stats: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("a block needs at least one stage")
        _one_of("skip", self.skip, SKIPS)
        _one_of("order", self.order, ORDERS)
        _one_of("memory", self.memory, ("default", "low"))
        if (self.projection is not None) != (self.skip == "projection"):
            raise ValueError(f"skip={self.skip!r} does not go with projection={self.projection!r}")
        if self.projection is not None and self.projection.act != IDENTITY:
            raise ValueError(f"a projection has no activation of its own, got act={self.projection.activation.name!r}")
        if self.order == "pre" and self.projection is not None and self.projection.norm:
            raise ValueError("a pre-activation projection reads the activated input and has no norm: set norm=False")
        convs = self.stages if self.projection is None else (*self.stages, self.projection)
        object.__setattr__(self, "convs", convs)
        object.__setattr__(self, "batch_stats", any(stage.norm and stage.batch_stats for stage in convs))

    @property
    def pads_values(self) -> bool:
        """Whether any convolution's padding holds values of its input."""
        return any(stage.pads_values for stage in self.convs)

    def of_constants(self) -> BlockSpec:
        """The same, and while a graph is traced none of its numbers is an input of the graph (`spec.constant`)."""
        if not torch.compiler.is_compiling():
            return self
        projection = None if self.projection is None else replace(self.projection)
        return replace(self, stages=tuple(replace(stage) for stage in self.stages), projection=projection)

    def with_memory(self, memory: Memory) -> BlockSpec:
        return replace(self, memory=memory)
