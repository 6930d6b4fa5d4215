"""Blocks for the tests: a `Case` says what to compute, `Case.build` makes its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import BlockSpec, IntPair, Memory, Order, Skip, StageSpec

ScaleKind = Literal["one", "float", "0-d", "[1]", "[C]", "[C,1,1]"]


@dataclass(frozen=True)
class Case:
    """A spec with the sizes of its tensors; `widths` and `kernels` are in the order of `spec.convs`."""

    spec: BlockSpec
    channels: int
    widths: tuple[int, ...]
    kernels: tuple[IntPair, ...]
    size: IntPair = (5, 6)
    batch: int = 2
    bias: bool = False
    affine: bool = True
    tracked: bool = True
    momentum: float | None = 0.1
    branch_scale: ScaleKind = "one"
    skip_scale: ScaleKind = "one"

    @property
    def sources(self) -> tuple[int, ...]:
        """Input channels of each convolution."""
        count = len(self.spec.stages)
        return (self.channels, *self.widths[: count - 1], *[self.channels] * (len(self.widths) - count))

    @property
    def sizes(self) -> list[IntPair]:
        """(H, W) of each convolution's output."""
        sizes, size = [], self.size
        for i, (stage, kernel) in enumerate(zip(self.spec.convs, self.kernels, strict=True)):
            size = stage.output_size(self.size if i == len(self.spec.stages) else size, kernel)
            sizes.append(size)
        return sizes

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        last = len(self.spec.stages) - 1
        return (self.batch, self.widths[last], *self.sizes[last])

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
        norm_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, BlockParams, BlockSpec]:
        """x, params, spec. The values are drawn in fp64 and rounded, so every dtype sees the same block."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0, mean: float = 0.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, dtype=torch.float64, generator=generator) * std + mean).to(to)

        def uniform(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return (torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5).to(to)

        def scale(kind: ScaleKind) -> Scale:
            if kind in ("one", "float"):
                return 1.0 if kind == "one" else -0.7
            width = self.out_shape[1]
            return uniform(*{"0-d": (), "[1]": (1,), "[C]": (width,), "[C,1,1]": (width, 1, 1)}[kind])

        stages = []
        for stage, source, width, kernel in zip(self.spec.convs, self.sources, self.widths, self.kernels, strict=True):
            fan_in = source // stage.groups * prod(kernel)
            weight = normal(width, source // stage.groups, *kernel, std=fan_in**-0.5)
            tensors = StageParams(
                weight.contiguous(memory_format=memory_format),
                normal(width, std=0.5) if self.bias else None,
                momentum=self.momentum,
            )
            if stage.norm:
                normed, to = source if self.spec.order == "pre" else width, norm_dtype or dtype
                if self.affine:
                    sign = torch.where(uniform(normed) > 0.8, 1, -1)
                    tensors = replace(
                        tensors, norm_weight=uniform(normed, to=to) * sign, norm_bias=normal(normed, std=0.4, to=to)
                    )
                if self.tracked or not stage.batch_stats:
                    tensors = replace(
                        tensors,
                        running_mean=normal(normed, std=0.3, to=to),
                        running_var=uniform(normed, to=to),
                        num_batches_tracked=torch.tensor(3),
                    )
            if stage.activation.kind.learned:
                sloped = source if self.spec.order == "pre" else width
                tensors = replace(tensors, slope=normal(sloped if sloped % 2 else 1, std=0.3, mean=0.2))
            stages.append(tensors)
        x = normal(self.batch, self.channels, *self.size, std=1.5, mean=0.3).contiguous(memory_format=memory_format)
        count = len(self.spec.stages)
        projection = stages[count] if self.spec.projection is not None else None
        params = BlockParams(tuple(stages[:count]), projection, scale(self.branch_scale), scale(self.skip_scale))
        return x, params, self.spec

    def upstream(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """A random gradient of the output."""
        generator = torch.Generator().manual_seed(seed + 1000)
        return torch.randn(self.out_shape, dtype=torch.float64, generator=generator).to(dtype)


def block(
    stages: int = 2,
    skip: Skip = "identity",
    *,
    order: Order = "post",
    memory: Memory = "default",
    channels: int = 4,
    width: int = 3,
    out_channels: int | None = None,
    kernel: int = 3,
    stride: int | IntPair = 1,
    strides_at: int = 0,
    dilation: int | IntPair = 1,
    groups: int = 1,
    act: str = "relu",
    norm: bool = True,
    batch_stats: bool | tuple[bool, ...] = True,
    eps: float = 1e-5,
    size: IntPair = (5, 6),
    batch: int = 2,
    bias: bool = False,
    affine: bool = True,
    tracked: bool = True,
    momentum: float | None = 0.1,
    branch_scale: ScaleKind = "one",
    skip_scale: ScaleKind = "one",
) -> Case:
    """A residual block of one kernel size with "same" padding and the stride on stage `strides_at`.

    `batch_stats` may be given for each convolution. A projection is a 1x1 convolution with the block's stride.
    """
    pair = (dilation, dilation) if isinstance(dilation, int) else dilation
    convs = stages + (skip == "projection")
    batches = (batch_stats,) * convs if isinstance(batch_stats, bool) else batch_stats
    padding = (pair[0] * (kernel // 2), pair[1] * (kernel // 2))
    chain = tuple(
        StageSpec(stride if i == strides_at else 1, padding, pair, groups, norm, batches[i], eps, act)  # type: ignore[arg-type]
        for i in range(stages)
    )
    projection = None
    if skip == "projection":
        projection = StageSpec(
            stride, norm=norm and order != "pre", batch_stats=batches[-1], eps=eps, act="identity", groups=1
        )
    last = out_channels or channels
    widths = (*[width] * (stages - 1), last, *[last] * (skip == "projection"))
    kernels = (*[(kernel, kernel)] * stages, *[(1, 1)] * (skip == "projection"))
    return Case(
        BlockSpec(chain, skip, projection, order, memory),
        channels,
        widths,
        kernels,
        size,
        batch,
        bias,
        affine,
        tracked,
        momentum,
        branch_scale,
        skip_scale,
    )


def bottleneck(
    skip: str,
    order: str = "post",
    act: str = "relu",
    memory: str = "default",
    *,
    channels: int = 24,
    width: int = 8,
    stride: int | None = None,
    **changes: Any,
) -> Case:
    """1x1, 3x3, 1x1; the 3x3 with a stride where there is a projection. changes: of the fields of `Case`."""
    step = stride or (2 if skip == "projection" else 1)
    projects = skip == "projection"
    spec = BlockSpec(
        (StageSpec(act=act), StageSpec(step, 1, act=act), StageSpec(act=act)),  # type: ignore[arg-type]
        skip,  # type: ignore[arg-type]
        StageSpec(step, act="identity", norm=order != "pre") if projects else None,
        order,  # type: ignore[arg-type]
        memory,  # type: ignore[arg-type]
    )
    widths = (width, width, channels, *[channels] * projects)
    kernels = ((1, 1), (3, 3), (1, 1), *[(1, 1)] * projects)
    return replace(Case(spec, channels, widths, kernels, size=(7, 6)), **changes)


def frozen(case: Case) -> Case:
    """The block with running statistics."""
    spec = case.spec
    projection = spec.projection and replace(spec.projection, batch_stats=False)
    stages = tuple(replace(s, batch_stats=False) for s in spec.stages)
    return replace(case, spec=replace(spec, stages=stages, projection=projection))
