"""Residual blocks computed wrongly, in place of `reference.residual_block`, for tests that must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from resnet_fused.ops import reference
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec

Formula = Callable[[Tensor, BlockParams, BlockSpec], Tensor]
right: Formula = reference.residual_block


def wrong_stride(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    """Right in shape: the stride is taken by the second convolution instead of the first."""
    first, second = spec.stages
    stages = (replace(first, stride=second.stride), replace(second, stride=first.stride))
    return right(x, params, replace(spec, stages=stages))


def scaled_branch(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return right(x, replace(params, branch_scale=1.0 + 1e-4), spec)


def other_epsilon(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return right(x, params, replace(spec, stages=tuple(replace(stage, eps=1e-3) for stage in spec.stages)))


def one_pixel(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    out = right(x, params, spec)
    return out + torch.zeros_like(out).index_put_((torch.tensor(0),) * 4, torch.tensor(1e-2))


def half_gradient(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    out = right(x, params, spec)
    return out.detach() + 0.5 * (out - out.detach())


def no_statistics(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    stages = tuple(replace(stage, running_mean=None, running_var=None) for stage in params.stages)
    return right(x, replace(params, stages=stages), spec)


def not_a_number(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return right(x, params, spec) * float("nan")


def no_masks(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    """Right in its value; the gradient passes every ReLU."""
    stages = tuple(replace(stage, act="identity") for stage in spec.stages)
    through = right(x, params, replace(spec, stages=stages))
    return right(x, params, spec).detach() + through - through.detach()


WRONG = [wrong_stride, scaled_branch, other_epsilon, one_pixel, half_gradient, no_statistics, not_a_number, no_masks]


def twice_the_noise(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    """No element far off, yet every one by four times eager's rounding."""
    out = right(x, params, spec)
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(out.shape, generator=generator, dtype=out.dtype) - 0.5
    return out + torch.where(out > 0, 6e-7 * noise, 0)
