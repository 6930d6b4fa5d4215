"""Blocks for the tests: a `Case` says what to compute, `Case.build` makes its tensors, `run` returns every result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Literal

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, assume, settings
from support.equivalence import Results
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams, Scale, StageParams, map_tensors
from resnet_fused.spec import ACTIVATIONS, BlockSpec, IntPair, Memory, Order, Skip, StageSpec

BACKENDS = ["native"]
FORMATS = [torch.contiguous_format, torch.channels_last]
LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]

ScaleKind = Literal["one", "float", "0-d", "[1]", "[C]", "[C,1,1]"]

family = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


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
    """A residual block of one kernel size with "same" padding and the stride on the first stage.

    `batch_stats` may be given for each convolution. A projection is a 1x1 convolution with the block's stride.
    """
    pair = (dilation, dilation) if isinstance(dilation, int) else dilation
    convs = stages + (skip == "projection")
    batches = (batch_stats,) * convs if isinstance(batch_stats, bool) else batch_stats
    padding = (pair[0] * (kernel // 2), pair[1] * (kernel // 2))
    chain = tuple(
        StageSpec(stride if i == 0 else 1, padding, pair, groups, norm, batches[i], eps, act)  # type: ignore[arg-type]
        for i in range(stages)
    )
    projection = None
    if skip == "projection":
        projection = StageSpec(
            stride, norm=norm and order == "post", batch_stats=batches[-1], eps=eps, act="identity", groups=1
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


@st.composite
def cases(draw: st.DrawFn, channels: tuple[int, ...] = (1, 2, 3, 4, 6, 8), values: int = 6) -> Case:
    """Any block that the specs can express, small, with at least `values` values behind each batch statistic."""
    count = draw(st.integers(1, 3))
    skip: Skip = draw(st.sampled_from(["none", "identity", "projection"]))
    order: Order = draw(st.sampled_from(["post", "pre"]))
    source = given = draw(st.sampled_from(channels))
    size = (draw(st.integers(3, 8)), draw(st.integers(3, 8)))
    pairs = list(product((1, 2), repeat=2))
    norms = st.sampled_from([(True, True), (True, True), (True, False), (False, False)])
    stages, kernels, widths, total = [], [], [], (1, 1)
    for i in range(count):
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6, 8) if source % g == 0]))
        kernel = (draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 2, 3, 5])))
        dilation = draw(st.sampled_from(pairs))
        stride = (1, 1) if skip == "identity" else draw(st.sampled_from(pairs))
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        if skip != "none":  # "same" padding of an odd kernel keeps the paths' sizes equal
            kernel = (kernel[0] | 1, kernel[1] | 1)
            padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
        total = (total[0] * stride[0], total[1] * stride[1])
        width = groups * draw(st.integers(1, 3))
        if i == count - 1 and skip == "identity":
            groups, width = (groups if given % groups == 0 else 1), given
        norm, batch_stats = draw(norms)
        act = draw(st.sampled_from(ACTIVATIONS))
        eps = draw(st.sampled_from([1e-5, 1e-3]))
        stages.append(StageSpec(stride, padding, dilation, groups, norm, batch_stats, eps, act))
        kernels.append(kernel)
        widths.append(width)
        source = width
    projection = None
    if skip == "projection":
        norm, batch_stats = draw(norms)
        pad = draw(st.integers(0, 1))
        projection = StageSpec(total, pad, norm=norm and order == "post", batch_stats=batch_stats, act="identity")
        kernels.append((2 * pad + 1,) * 2)
        widths.append(widths[-1])
    kinds: list[ScaleKind] = ["one", "float", "0-d", "[1]", "[C]", "[C,1,1]"]
    case = Case(
        BlockSpec(tuple(stages), skip, projection, order, draw(st.sampled_from(["default", "low"]))),
        given,
        tuple(widths),
        tuple(kernels),
        size,
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0.1, 0.9, 0.0, None])),
        draw(st.sampled_from(kinds)),
        "one" if skip == "none" else draw(st.sampled_from(kinds)),
    )
    assume(all(min(s) >= 1 for s in case.sizes))
    assume(all(case.batch * h * w >= values for h, w in (case.size, *case.sizes)))
    return case


def named_tensors(params: BlockParams) -> dict[str, Tensor]:
    """Every tensor of params by name, e.g. "stages.0.weight"."""
    named: dict[str, Tensor] = {}
    map_tensors(params, lambda name, t: named.setdefault(name, t))
    return named


def is_buffer(name: str) -> bool:
    """Whether the tensor of this name is a statistic or a counter, which receives no gradient."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def leaves(params: BlockParams, requires_grad: Callable[[str], bool] = lambda name: True) -> BlockParams:
    """Leaf views of the parameters, which require a gradient where asked, and copies of the buffers."""
    return map_tensors(
        params, lambda name, t: t.clone() if is_buffer(name) else t.detach().requires_grad_(requires_grad(name))
    )


def to_double(params: BlockParams) -> BlockParams:
    return map_tensors(params, lambda name, t: t.double() if t.is_floating_point() else t)


def run(x: Tensor, params: BlockParams, spec: BlockSpec, backend: str, dout: Tensor | None = None) -> Results:
    """The output, the gradient of x and of each parameter if `dout` is given, and the buffers afterwards.

    Nothing given is changed.
    """
    x, params = x.detach().requires_grad_(dout is not None), leaves(params, lambda name: dout is not None)
    out = functional.residual_block(x, params, spec, backend=backend)
    results: Results = {"out": out.detach()}
    if dout is not None:
        out.backward(dout)
        results["grad of x"] = x.grad
    for name, tensor in named_tensors(params).items():
        if is_buffer(name):
            results[name] = tensor
        elif dout is not None:
            results[f"grad of {name}"] = tensor.grad
    return results


def run_exact(x: Tensor, params: BlockParams, spec: BlockSpec, dout: Tensor | None = None) -> Results:
    """`run` of the reference formula in fp64, on the same values."""
    return run(x.double(), to_double(params), spec, "eager", None if dout is None else dout.double())


def vanishing(spec: BlockSpec) -> set[str]:
    """Gradients that are zero but for rounding: a batch normalisation takes away what a bias before it adds."""
    names = [*(f"stages.{i}" for i in range(len(spec.stages))), "projection"]
    biases = {f"grad of {n}.bias": s for n, s in zip(names, spec.convs, strict=False)}
    if spec.order == "post":
        return {name for name, stage in biases.items() if stage.norm and stage.batch_stats}
    after = dict(zip(biases, spec.stages[1:], strict=False))  # the norm that reads u_{i+1} = conv_i(...)
    return {name for name, stage in after.items() if stage.norm and stage.batch_stats}
