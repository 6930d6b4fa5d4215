"""The formulas in plain PyTorch: the oracle of tests, `verify` and benches, and the `eager` backend.

Short on purpose; every other implementation is held against this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.ops import sync_batch_norm
from resnet_fused.ops.gate import Gate, per_channel
from resnet_fused.ops.running_stats import count_one, update_factor
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import Activation, BlockSpec, StageSpec


def residual_block(
    x: Tensor, params: BlockParams, spec: BlockSpec, gate: Gate | None = None, residual: Tensor | None = None
) -> Tensor:
    """The block of `spec` on x [N, C, H, W] -> [N, C_out, H', W']; differentiable any number of times.

    gate, residual: as in `functional.residual_block`.

    Updates the running statistics of stages with `batch_stats` in place and counts the batch, as ``nn.BatchNorm2d``
    does.
    """
    stages = list(zip(spec.stages, params.stages, strict=True))
    skip = residual if spec.skip == "none" else x
    if spec.order == "pre":
        u = x
        for i, (stage, tensors) in enumerate(stages):
            u = _act(stage, tensors, norm(stage, tensors, u))
            if i == 0 and spec.projection is not None and params.projection is not None:
                skip = _conv(spec.projection, params.projection, u)
            u = _conv(stage, tensors, u)
        return join(u, skip, params, spec, gate)

    u = x
    for stage, tensors in stages[:-1]:
        u = _act(stage, tensors, norm(stage, tensors, _conv(stage, tensors, u)))
    stage, tensors = stages[-1]
    u = norm(stage, tensors, _conv(stage, tensors, u))
    if spec.projection is not None and params.projection is not None:
        skip = norm(spec.projection, params.projection, _conv(spec.projection, params.projection, x))
    if spec.order == "branch":
        return join(_act(stage, tensors, u), skip, params, spec, gate)
    return _act(stage, tensors, join(u, skip, params, spec, gate))


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


def norm(stage: StageSpec, tensors: StageParams, y: Tensor) -> Tensor:
    if not stage.norm:
        return y
    if stage.promotes and tensors.running_mean is not None and torch.is_autocast_enabled(y.device.type):
        y = y.to(torch.promote_types(y.dtype, tensors.running_mean.dtype))
    group = None if tensors.processes is None else tensors.processes.group
    if group is not None:
        out = sync_batch_norm.of_pytorch(y, stage, tensors, group)
        count_one(tensors)
        return out
    momentum = update_factor(tensors) if stage.batch_stats else 0.0
    if stage.batch_stats:
        count_one(tensors)
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


def _gated(branch: Tensor, gate: Gate) -> Tensor:
    """gate * branch, the gate computed from the branch's mean over pixels where it is a function."""
    factor = gate if isinstance(gate, Tensor) else gate(branch.mean((2, 3)))
    return branch * per_channel(factor, branch)[:, :, None, None].to(branch.dtype)


def join(branch: Tensor, skip: Tensor | None, params: BlockParams, spec: BlockSpec, gate: Gate | None) -> Tensor:
    """branch_scale * gate * branch + skip_scale * skip."""
    out = scaled(branch if gate is None else _gated(branch, gate), params.branch_scale)
    if skip is None:
        return out
    total = out + scaled(skip, params.skip_scale)
    return total.to(out.dtype) if spec.in_place_add else total


def scaled(t: Tensor, scale: Scale) -> Tensor:
    if isinstance(scale, Tensor):
        return t * scale.reshape(1, -1, 1, 1).to(t.dtype)
    return t if scale == 1.0 else t * scale
