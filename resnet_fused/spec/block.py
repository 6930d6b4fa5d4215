"""What a residual block computes, as frozen, hashable values.

A block is a chain of stages plus a skip path::

    post-activation (ResNet v1):  P_1 = x,                P_{i+1} = act_i(norm_i(conv_i(P_i)))
                                  out = act_n(branch_scale * norm_n(conv_n(P_n)) + skip_scale * S)
                                  S   = x   or   norm_s(conv_s(x))

    pre-activation  (ResNet v2):  P_i = act_i(norm_i(u_i)),   u_1 = x,   u_{i+1} = conv_i(P_i)
                                  out = branch_scale * u_{n+1} + skip_scale * S
                                  S   = x   or   conv_s(P_1)

Post-activation is He et al. 2015 (arXiv:1512.03385), pre-activation He et al. 2016 (arXiv:1603.05027),
whose projection reads the activated input and has no normalisation.

A spec holds no tensor and knows no module: it keys caches and crosses into C++ as two flat lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Activation = Literal["relu", "identity"]
Order = Literal["post", "pre"]
Skip = Literal["none", "identity", "projection"]
Memory = Literal["default", "low"]
IntPair = tuple[int, int]

ACTIVATIONS: tuple[Activation, ...] = ("identity", "relu")  # index = code in csrc/block/spec.h


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
    act:         applied after the normalisation; the last stage's (post order) applies after the residual add.

    Raises ValueError for a value out of range.
    """

    stride: int | IntPair = 1
    padding: int | IntPair = 0
    dilation: int | IntPair = 1
    groups: int = 1
    norm: bool = True
    batch_stats: bool = True
    eps: float = 1e-5
    act: Activation = "relu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", _pair("stride", self.stride, 1))
        object.__setattr__(self, "padding", _pair("padding", self.padding, 0))
        object.__setattr__(self, "dilation", _pair("dilation", self.dilation, 1))
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups must be a positive int, got {self.groups!r}")
        if not 0 <= self.eps < float("inf"):  # false for NaN
            raise ValueError(f"eps must be a finite number >= 0, got {self.eps!r}")
        _one_of("act", self.act, ACTIVATIONS)

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
    order:      "post" or "pre" activation.
    in_place_add: the sum is ``branch += skip``, as in torchvision and timm: under autocast, or with parameters that
                widen the skip path, it keeps the branch's dtype where ``branch + skip`` takes the wider one.
    memory:     what backward keeps: "default" the convolution outputs, "low" recomputes those of the
                last stage and the projection.

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
        _one_of("skip", self.skip, ("none", "identity", "projection"))
        _one_of("order", self.order, ("post", "pre"))
        _one_of("memory", self.memory, ("default", "low"))
        if (self.projection is not None) != (self.skip == "projection"):
            raise ValueError(f"skip={self.skip!r} does not go with projection={self.projection!r}")
        if self.projection is not None and self.projection.act != "identity":
            raise ValueError(f"a projection has no activation of its own, got act={self.projection.act!r}")
        if self.order == "pre" and self.projection is not None and self.projection.norm:
            raise ValueError("a pre-activation projection reads the activated input and has no norm: set norm=False")
        convs = self.stages if self.projection is None else (*self.stages, self.projection)
        object.__setattr__(self, "convs", convs)
        object.__setattr__(self, "batch_stats", any(stage.norm and stage.batch_stats for stage in convs))

    def with_memory(self, memory: Memory) -> BlockSpec:
        return replace(self, memory=memory)

    def encode(self, how: int = 0) -> tuple[list[int], list[float]]:
        """The flat lists that csrc/block/spec.h decodes: 5 header ints, then 9 ints and one eps a conv.

        how: how CUDA kernels are to run (`resnet_fused.backends.how`), 0 where they choose.
        """
        if "_encoded" not in self.__dict__:
            self.__dict__["_encoded"] = self._encode()
        ints, eps = self.__dict__["_encoded"]
        return [*ints[:4], how, *ints[5:]], [*eps]

    def _encode(self) -> tuple[list[int], list[float]]:
        header = [
            len(self.stages),
            ("none", "identity", "projection").index(self.skip),
            int(self.order == "pre"),
            int(self.memory == "low"),
            0,
        ]
        for stage in self.convs:
            (sh, sw), (ph, pw), (dh, dw) = stage.geometry
            norm = int(stage.norm) + int(stage.norm and stage.batch_stats)  # 0 none, 1 running, 2 batch
            header += [sh, sw, ph, pw, dh, dw, stage.groups, norm, ACTIVATIONS.index(stage.act)]
        return header, [stage.eps for stage in self.convs]
