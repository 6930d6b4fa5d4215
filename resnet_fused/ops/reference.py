"""The formulas in plain PyTorch: the oracle of tests, `verify` and benches, and the `eager` backend.

Short on purpose; every other implementation is held against this one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.ops.running_stats import update_factor
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import Activation, BlockSpec, StageSpec


def residual_block(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    """The block of `spec` on x [N, C, H, W] -> [N, C_out, H', W']; differentiable any number of times.

    Updates the running statistics of stages with `batch_stats` in place, as ``nn.BatchNorm2d`` does, but not
    `num_batches_tracked`: that is its caller's.
    """
    stages = list(zip(spec.stages, params.stages, strict=True))
    skip = x
    if spec.order == "pre":
        u = x
        for i, (stage, tensors) in enumerate(stages):
            u = _act(stage, tensors, _norm(stage, tensors, u))
            if i == 0 and spec.projection is not None and params.projection is not None:
                skip = _conv(spec.projection, params.projection, u)
            u = _conv(stage, tensors, u)
        return _join(u, skip, params, spec)

    u = x
    for stage, tensors in stages[:-1]:
        u = _act(stage, tensors, _norm(stage, tensors, _conv(stage, tensors, u)))
    stage, tensors = stages[-1]
    u = _norm(stage, tensors, _conv(stage, tensors, u))
    if spec.projection is not None and params.projection is not None:
        skip = _norm(spec.projection, params.projection, _conv(spec.projection, params.projection, x))
    if spec.order == "branch":
        return _join(_act(stage, tensors, u), skip, params, spec)
    return _act(stage, tensors, _join(u, skip, params, spec))


def batch_norm_act(x: Tensor, bn: nn.Module, residual: Tensor | None, act: Activation) -> Tensor:
    """act(bn(x) + residual); the module updates its own statistics."""
    z = bn(x)
    if residual is not None:
        z = z + residual
    return act(z)


def _conv(stage: StageSpec, tensors: StageParams, x: Tensor) -> Tensor:
    stride, padding, dilation = stage.geometry
    if stage.padding_mode != "zeros":  # as nn.Conv2d does it, in memory format, too
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=stage.padding_mode)
        padding = (0, 0)
    return F.conv2d(x, tensors.weight, tensors.bias, stride, padding, dilation, stage.groups)


def _norm(stage: StageSpec, tensors: StageParams, y: Tensor) -> Tensor:
    if not stage.norm:
        return y
    momentum = update_factor(tensors) if stage.batch_stats else 0.0
    return F.batch_norm(
        y,
        tensors.running_mean,
        tensors.running_var,
        tensors.norm_weight,
        tensors.norm_bias,
        training=stage.batch_stats,
        momentum=momentum,
        eps=stage.eps,
    )


def _act(stage: StageSpec, tensors: StageParams, z: Tensor) -> Tensor:
    return stage.activation(z, tensors.slope)


def _join(branch: Tensor, skip: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    out = _scaled(branch, params.branch_scale)
    if spec.skip == "none":
        return out
    total = out + _scaled(skip, params.skip_scale)
    return total.to(out.dtype) if spec.in_place_add else total


def _scaled(t: Tensor, scale: Scale) -> Tensor:
    if isinstance(scale, Tensor):
        return t * scale.reshape(1, -1, 1, 1).to(t.dtype)
    return t if scale == 1.0 else t * scale
