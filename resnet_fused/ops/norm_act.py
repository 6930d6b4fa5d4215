"""act(batch_norm(x) + residual) on its own operators, with the statistics of this process's batch or of a group's."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops import autograd, gated_block, norm_operators, running_stats, sync_batch_norm
from resnet_fused.ops.join_operators import JoinNorm
from resnet_fused.spec import Activation
from resnet_fused.spec.activations import IDENTITY, RELU
from resnet_fused.spec.batch_norm import BatchNorm


def norm_act(x: Tensor, norm: BatchNorm, residual: Tensor | None, act: Activation) -> Tensor:
    """act(norm(x) + residual); the norm's buffers are written once out is computed, before a tensor is saved.

    All tensors are as `validation.check_batch_norm_act` wants them, residual in x's dtype. x may be empty where the
    norm has a group.
    """
    with torch.no_grad():
        mean, var, count = _statistics(x, norm)
    tensors = (x, residual, norm.weight, norm.bias)
    relu = act == RELU

    def blend() -> None:
        if count is not None:
            running_stats.update_one(norm, mean, var, count)
            running_stats.count_one(norm)

    if act not in (IDENTITY, RELU):
        joined = JoinNorm(mean, var, norm.weight, norm.bias, norm.eps, count is not None)
        return gated_block.norm_act(x, joined, residual, act, blend)
    if autograd.needs_grad(tensors):
        # checkpointing computes this again and stops where the last tensor is saved; a traced Function cannot write
        within = None if torch.compiler.is_compiling() else blend
        out = autograd.BatchNormAct.apply(*tensors, mean, var, count, norm.eps, relu, norm.group, within)
        if within is None:
            blend()
        return out
    if x.numel() == 0:
        out = torch.empty_like(x)
    else:
        out, _ = norm_operators.normalize_act(
            x, mean, var, norm.weight, norm.bias, residual, norm.eps, relu, save_mask=False
        )
    blend()
    return out


def _statistics(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor, int | None]:
    """Mean and variance to normalise with, and the values per channel behind them, None for the running ones."""
    if norm.batch_stats:
        count = x.numel() // x.shape[1]
        if count:
            stats = norm_operators.batch_statistics(x)
        else:  # zeros that do not count, in the dtype of statistics
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            stats = x.new_zeros((2, x.shape[1]), dtype=wide)
        if norm.group is not None:
            stats, count = sync_batch_norm.merge_statistics(stats, count, norm.group)
        mean, var = stats
        return mean, var, count
    assert norm.running_mean is not None and norm.running_var is not None  # by validation
    return norm.running_mean, norm.running_var, None
