"""Chains of fused blocks, small enough to have their formula on one line; what several analyses measure on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, Skip, StageSpec


@dataclass(frozen=True)
class Chain:
    """Blocks in their order, each run by `functional.residual_block`."""

    blocks: tuple[tuple[BlockParams, BlockSpec], ...]

    def __call__(self, x: Tensor) -> Tensor:
        for params, spec in self.blocks:
            x = functional.residual_block(x, params, spec)
        return x

    def with_skip(self, skip: Skip) -> Chain:
        return Chain(tuple((params, replace(spec, skip=skip)) for params, spec in self.blocks))

    def path(self, passed: list[int]) -> Chain:
        """A path of the unravelled network (arXiv:1605.06431): the branches of these blocks, past the others."""
        plain = self.with_skip("none").blocks
        return Chain(tuple(plain[i] for i in passed))


def scalar_chain(a: float, depth: int, skip: Skip, dtype: torch.dtype = torch.float64) -> Chain:
    """x_{l+1} = a x_l, or x_l + a x_l with the identity skip: 1x1 convolutions of one channel, no activation."""
    spec = BlockSpec((StageSpec(norm=False, batch_stats=False, act="identity"),), skip=skip)
    params = BlockParams((StageParams(torch.full((1, 1, 1, 1), a, dtype=dtype)),))
    return Chain(((params, spec),) * depth)


def relu_chain(depth: int, width: int, skip: Skip, seed: int = 0) -> Chain:
    """g(x) = W2 relu(W1 x + b) on [N, width, 1, 1] in float64, random.

    W1 ~ N(0, 1 / width), W2 ~ N(0, 2 / width), b ~ N(0, 1 / 4): E|g(x)|^2 = |x|^2 + width / 4, so that a plain chain
    neither fades nor grows much (He et al., arXiv:1502.01852).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = StageSpec(norm=False, batch_stats=False, act="relu")
    spec = BlockSpec((hidden, replace(hidden, act="identity")), skip=skip)
    found = []
    for _ in range(depth):
        first = StageParams(normal(width, width, 1, 1, std=math.sqrt(1 / width)), normal(width, std=0.5))
        last = StageParams(normal(width, width, 1, 1, std=math.sqrt(2 / width)))
        found.append((BlockParams((first, last)), spec))
    return Chain(tuple(found))


def linear_conv_chain(depth: int, channels: int, kernel: int, skip: Skip, generator: torch.Generator) -> Chain:
    """g(x) = W * x, odd square kernels without activation on [N, channels, H, W] in float64; E|g(x)|^2 = E|x|^2."""
    spec = BlockSpec((StageSpec(padding=kernel // 2, norm=False, batch_stats=False, act="identity"),), skip=skip)
    std = 1 / math.sqrt(channels * kernel**2)

    def weight() -> Tensor:
        return std * torch.randn(channels, channels, kernel, kernel, generator=generator, dtype=torch.float64)

    return Chain(tuple((BlockParams((StageParams(weight()),)), spec) for _ in range(depth)))
