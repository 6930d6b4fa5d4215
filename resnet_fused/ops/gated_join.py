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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import join_operators as operators
from resnet_fused.ops.autograd import refuse_second_derivative
from resnet_fused.spec import Activation


@dataclass(frozen=True)
class JoinNorm:
    """norm(y) = (y - mean) / sqrt(var + eps) * weight + bias; all [C], weight and bias may be None.

    count:   the values per channel behind mean and var, where they are the batch's; None where they are constants.
    changes: whether it is anything but y itself.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    count: int | None
    changes: bool = True

    @classmethod
    def identity(cls, y: Tensor) -> JoinNorm:
        zeros = y.new_zeros(y.shape[1], dtype=operators.arithmetic_dtype(y))
        return cls(zeros, torch.ones_like(zeros), None, None, 0.0, None, changes=False)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Saved by the Functions, which holds them against their versions."""
        return self.mean, self.var, self.weight, self.bias


def batch_statistics(images: Tensor) -> Tensor:
    """[2, C] (mean, biased variance) of the batch from those of its images [N, 2, C], which are equally large.

    Chan, Golub & LeVeque 1979: the mean of the variances and the variance of the means.
    """
    means, variances = images.double().unbind(1)
    return torch.stack([means.mean(0), variances.mean(0) + means.var(0, correction=0)]).to(images.dtype)


def pooled_norm(y: Tensor, norm: JoinNorm, image_means: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y for `gated_join`, pooled, handoff).

    image_means: [N, C], of y; None where the gate reads nothing.
    pooled:      [N, C] in y's dtype: the mean of norm(y) over each image's pixels; None without image_means.
    """
    return PooledNorm.apply(y, norm.weight, norm.bias, norm, image_means)


def gated_join(
    y: Tensor, gate: Tensor, skip: Tensor | None, slope: Tensor | None, handoff: Tensor, norm: JoinNorm, act: Activation
) -> Tensor:
    """act(gate * norm(y) + skip), channels_last; y and handoff are `pooled_norm`'s, gate [N, C] of any float dtype."""
    return GatedJoin.apply(y, gate, skip, slope, handoff, norm, act)


def _scale(norm: JoinNorm) -> Tensor:
    """weight / sqrt(var + eps), float64."""
    scale = (norm.var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.double()


def _affine(norm: JoinNorm, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 3, C]: center, scale and shift of gate * norm."""
    if not norm.changes:
        factor = gate.to(dtype)
        zeros = torch.zeros_like(factor)
        return torch.stack([zeros, factor, zeros], 1)
    factor = gate.double()
    shift = torch.zeros_like(factor) if norm.bias is None else factor * norm.bias.double()
    return torch.stack([norm.mean.double().expand_as(factor), factor * _scale(norm), shift], 1).to(dtype)


class PooledNorm(torch.autograd.Function):
    """``apply(y, weight, bias, norm, image_means)``; weight and bias are norm's, named for their gradients."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, norm: JoinNorm, image_means: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.save_for_backward(y, image_means, *norm.tensors)
        ctx.settings = norm.eps, norm.count
        ctx.set_materialize_grads(False)
        pooled = None
        if image_means is not None and not norm.changes:
            pooled = image_means.to(y.dtype)
        elif image_means is not None:
            centred = (image_means.double() - norm.mean) * _scale(norm)
            pooled = (centred if bias is None else centred + bias).to(y.dtype)
        handoff = torch.zeros((3, *y.shape[:2]), dtype=torch.float64, device=y.device)
        return y.view_as(y), pooled, handoff

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, d_pooled: Tensor | None, handed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, image_means, *tensors = ctx.saved_tensors
        norm = JoinNorm(*tensors, *ctx.settings)
        with torch.no_grad():
            grads = PooledNorm._gradients(ctx.needs_input_grad, y, image_means, norm, dz, d_pooled, handed)
        return *refuse_second_derivative("residual_block", grads, [dz, y, norm.weight]), None, None

    @staticmethod
    def _gradients(
        needs: tuple[bool, ...],
        y: Tensor,
        image_means: Tensor | None,
        norm: JoinNorm,
        dz: Tensor | None,
        d_pooled: Tensor | None,
        handed: Tensor | None,
    ) -> list[Tensor | None]:
        """Of y, weight and bias.

        The gradient of norm(y) is g = gate * dz + d_pooled / HW; y's is scale * (g - mean(g) - xhat * mean(g * xhat)),
        the means over the batch, without them where the statistics are constants.
        """
        needs_y, needs_weight, needs_bias = needs[:3]
        pixels = y.shape[2] * y.shape[3]
        zeros = torch.zeros(y.shape[:2], dtype=torch.float64, device=y.device)
        gate, sum_dz, sum_dz_y = (zeros, zeros, zeros) if handed is None else handed.unbind(0)
        spread = zeros if d_pooled is None else d_pooled.double()
        inverse_std = (norm.var.double() + norm.eps).rsqrt()
        sum_g = (gate * sum_dz + spread).sum(0)
        sum_g_xhat = gate * sum_dz_y
        if image_means is not None and d_pooled is not None:
            sum_g_xhat = sum_g_xhat + spread * (image_means.double() - norm.mean)
        sum_g_xhat = sum_g_xhat.sum(0) * inverse_std
        d_weight = sum_g_xhat.to(norm.weight.dtype) if needs_weight and norm.weight is not None else None
        d_bias = sum_g.to(norm.bias.dtype) if needs_bias and norm.bias is not None else None
        if not needs_y:
            return [None, d_weight, d_bias]
        scale = _scale(norm)
        k_y, k = zeros, scale * spread / pixels
        if norm.count is not None:
            k_y = zeros - scale * inverse_std * sum_g_xhat / norm.count
            k = k - scale * sum_g / norm.count
        center = norm.mean.double().expand_as(zeros)
        coefficients = torch.stack([center, scale * gate, k_y, k], 1).to(operators.arithmetic_dtype(y))
        reads_y = norm.count is not None or d_pooled is not None
        dy = operators.gated_join_backward_apply(
            torch.zeros_like(y) if dz is None else dz, y if reads_y else None, coefficients
        )
        return [dy, d_weight, d_bias]


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
        affine = _affine(norm, gate, operators.arithmetic_dtype(y))
        out = operators.gated_join(y, affine, skip, act, slope)
        reads = act.reads
        ctx.save_for_backward(
            y,
            gate,
            affine,
            slope,
            out if reads == "output" else None,
            skip if reads == "input" else None,
            *norm.tensors,
        )
        ctx.settings, ctx.act = (norm.eps, norm.count), act
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, affine, slope, out, skip, *tensors = ctx.saved_tensors
        norm = JoinNorm(*tensors, *ctx.settings)
        needs = ctx.needs_input_grad
        with torch.no_grad():
            sums, masked = operators.gated_join_backward_reduce(dout, out, y, affine, skip, ctx.act, slope)
            dz = masked if masked.numel() else dout
            sum_dz, sum_dz_y = sums[:, 0], sums[:, 1]
            d_gate = d_slope = None
            if needs[1]:
                d_gate = sum_dz_y * _scale(norm)
                d_gate = (d_gate if norm.bias is None else d_gate + sum_dz * norm.bias.double()).to(gate.dtype)
            if needs[3]:
                of_channels = sums[:, 2].sum(0)
                d_slope = (of_channels if slope.numel() > 1 else of_channels.sum().reshape(1)).to(slope.dtype)
            handed = torch.stack([gate.double(), sum_dz, sum_dz_y])
        grads = [dz, d_gate, dz if needs[2] else None, d_slope, handed]
        return *refuse_second_derivative("residual_block", grads, [dout, y, gate, skip]), None, None
