"""The autograd Functions of a block's end with a gate: out = act(gate * norm(y) + skip), gate [N, C].

What a gate is computed from (the mean of norm(y) over an image's pixels) comes out of the pass that gathers the norm's
statistics, and norm(y) itself is never stored: `PooledNorm` hands on y, `GatedJoin` normalises while it adds.

Backward has two passes over memory. The join's reduction gives dz and, for each image, the sums that the gradients of
the gate and of the norm are made of. Only when the gate's own layers have gone backward is everything known that the
gradient of y needs, so `GatedJoin` hands its sums to `PooledNorm` in place of the gradient of a tensor that exists for
this alone (`handoff`), and its dz unscaled; the second pass is `PooledNorm`'s.

Saved: y and `out` (or the skip, where the activation's derivative does not follow from its output).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import join_operators as operators
from resnet_fused.ops.autograd import refuse_second_derivative
from resnet_fused.ops.join_operators import JoinNorm
from resnet_fused.spec import Activation


def pooled_norm(y: Tensor, norm: JoinNorm, pools: bool) -> tuple[Tensor, Tensor | None, Tensor, JoinNorm]:
    """(y for `gated_join`, pooled, handoff, the norm).

    norm:   without mean and var where they are the batch's, which the norm returned has.
    pooled: [N, C] in y's dtype: the mean of norm(y) over each image's pixels; None unless it `pools`.
    """
    means = pooled = None
    if pools or norm.of_batch:
        with torch.no_grad():
            statistics, *of_images = operators.pooled_statistics(y, norm, pools)
        if norm.of_batch:
            norm = replace(norm, mean=statistics[0], var=statistics[1])
        if pools:
            means, pooled = of_images
    return *PooledNorm.apply(y, norm.weight, norm.bias, norm, means, pooled), norm


def gated_join(
    y: Tensor, gate: Tensor, skip: Tensor | None, slope: Tensor | None, handoff: Tensor, norm: JoinNorm, act: Activation
) -> Tensor:
    """act(gate * norm(y) + skip), channels_last; y, handoff and norm are `pooled_norm`'s."""
    return GatedJoin.apply(y, gate, skip, slope, handoff, norm, act)


class PooledNorm(torch.autograd.Function):
    """``apply(y, weight, bias, norm, means, pooled)``; weight and bias are norm's, named for their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: JoinNorm,
        means: Tensor | None,
        pooled: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.save_for_backward(y, means, *norm.tensors)  # which holds them against their versions
        ctx.eps, ctx.of_batch = norm.eps, norm.of_batch
        ctx.set_materialize_grads(False)
        handoff = torch.zeros((3, *y.shape[:2]), dtype=torch.float64, device=y.device)
        return y.view_as(y), None if pooled is None else pooled.view_as(pooled), handoff

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, d_pooled: Tensor | None, handed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, means, mean, var, weight, bias = ctx.saved_tensors
        norm = JoinNorm(mean, var, weight, bias, ctx.eps, ctx.of_batch)
        needs = ctx.needs_input_grad[:3]
        with torch.no_grad():
            found = operators.pooled_norm_backward(dz, y, d_pooled, handed, means, norm, needs)
        grads = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
        return *refuse_second_derivative("residual_block", grads, [dz, y, weight]), None, None, None


class GatedJoin(torch.autograd.Function):
    """``apply(y, gate, skip, slope, handoff, norm, act)`` -> out; the norm's gradients are `PooledNorm`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gate: Tensor,
        skip: Tensor | None,
        slope: Tensor | None,
        handoff: Tensor,
        norm: JoinNorm,
        act: Activation,
    ) -> Tensor:
        out = operators.gated_join(y, gate, norm, skip, act, slope)
        reads = act.reads
        ctx.save_for_backward(
            y, gate, slope, out if reads == "output" else None, skip if reads == "input" else None, *norm.tensors
        )
        ctx.eps, ctx.act = norm.eps, act
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, slope, out, skip, mean, var, weight, bias = ctx.saved_tensors
        norm, needs = JoinNorm(mean, var, weight, bias, ctx.eps), ctx.needs_input_grad
        with torch.no_grad():
            masked, d_gate, d_slope, handed = operators.gated_join_backward(
                dout, out, y, gate, norm, skip, ctx.act, slope
            )
        dz = masked if masked.numel() else dout
        grads = [
            dz,
            d_gate if needs[1] else None,
            dz if needs[2] else None,
            d_slope if needs[3] else None,
            handed,
        ]
        return *refuse_second_derivative("residual_block", grads, [dout, y, gate, skip]), None, None
