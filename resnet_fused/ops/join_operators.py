"""The operators of a block's end with a gate, act(gate * norm(y) + skip): typed calls, fake kernels.

Schemas stand in csrc/ops/gated_join.cpp and gate.cpp; the kernels are csrc/cpu's.

y, skip, dout, out, dz, dy: [N, C, H, W] of one dtype, any strides, not empty; results are channels_last.
gate:                       [N, C] of any float dtype.
slope:                      [1] or [C], of an activation that learns one.
The operators but `gate_` are functional: nothing is written in place, no output aliases an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops.gate import GateLayer
from resnet_fused.ops.operators import load_error, require
from resnet_fused.spec import Activation


@dataclass(frozen=True)
class JoinNorm:
    """norm(y) = (y - mean) / sqrt(var + eps) * weight + bias; all [C], weight and bias may be None.

    Without mean and var it is y itself. of_batch: whether they are those of y, which gradients flow through.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    of_batch: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.mean, self.var, self.weight, self.bias


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """In which per-channel values are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pooled_statistics(y: Tensor, norm: JoinNorm, pools: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(statistics, means, pooled), [0] where not asked for.

    statistics: [2, C], mean and biased variance of the batch, where `norm.of_batch`; they are then the norm's.
    means:      [N, C], where it pools: the mean of each image of y, like statistics in `arithmetic_dtype`.
    pooled:     [N, C] in y's dtype: that of norm(y).
    """
    require()
    return torch.ops.resnet_fused.pooled_statistics.default(y, *norm.tensors, norm.eps, norm.of_batch, pools)


def gated_join(
    y: Tensor, gate: Tensor, norm: JoinNorm, skip: Tensor | None, act: Activation, slope: Tensor | None
) -> Tensor:
    require()
    return torch.ops.resnet_fused.gated_join.default(
        y, gate, *norm.tensors, norm.eps, skip, act.code, act.parameter, slope
    )


def gate_(y: Tensor, skip: Tensor | None, layers: Sequence[GateLayer], act: Activation, slope: Tensor | None) -> None:
    """y := act(gate(the mean of y over pixels) * y + skip); y is channels_last. The one operator that writes."""
    require()
    weights, biases, acts = map(list, zip(*layers, strict=True))
    torch.ops.resnet_fused.gate_.default(y, skip, weights, biases, acts, act.code, act.parameter, slope)


def gated_join_backward(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    gate: Tensor,
    norm: JoinNorm,
    skip: Tensor | None,
    act: Activation,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, d_gate, d_slope, handoff).

    out:     forward's, where the derivative follows from it (`Activation.reads` is "output"); then skip is not read.
    dz:      dout * act'; [0] for the identity, whose dz is dout.
    d_slope: [0] without a slope.
    handoff: [3, N, C] float64, what `pooled_norm_backward` reads of this pass.
    """
    require()
    return torch.ops.resnet_fused.gated_join_backward.default(
        dout, out, y, gate, *norm.tensors, norm.eps, skip, act.code, act.parameter, slope
    )


def pooled_norm_backward(
    dz: Tensor | None,
    y: Tensor,
    d_pooled: Tensor | None,
    handoff: Tensor | None,
    means: Tensor | None,
    norm: JoinNorm,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, d_weight, d_bias), [0] where not needed; absent gradients are zeros."""
    require()
    return torch.ops.resnet_fused.pooled_norm_backward.default(
        dz, y, d_pooled, handoff, means, *norm.tensors, norm.eps, norm.of_batch, needs
    )


def _register_fakes() -> None:
    def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return torch.library.register_fake(f"resnet_fused::{name}")

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def of_channels(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    @register("pooled_statistics")
    def _(y, mean, var, weight, bias, eps, of_batch, pools):  # type: ignore[no-untyped-def]
        images, channels = y.shape[:2]
        statistics = y.new_empty((2, channels), dtype=arithmetic_dtype(y)) if of_batch else y.new_empty(0)
        if not pools:
            return statistics, y.new_empty(0), y.new_empty(0)
        pooled = y.new_empty((images, channels))
        return statistics, torch.empty_like(pooled, dtype=arithmetic_dtype(y)), pooled

    @register("gated_join")
    def _(y, gate, mean, var, weight, bias, eps, skip, act, parameter, slope):  # type: ignore[no-untyped-def]
        return like(y)

    @register("gate_")
    def _(y, skip, weights, biases, acts, act, parameter, slope):  # type: ignore[no-untyped-def]
        return None

    @register("gated_join_backward")
    def _(dout, out, y, gate, mean, var, weight, bias, eps, skip, act, parameter, slope):  # type: ignore[no-untyped-def]
        dz = like(y) if act else y.new_empty(0)  # code 0: the identity
        d_slope = y.new_empty(0) if slope is None else of_channels(slope)
        return dz, of_channels(gate), d_slope, y.new_empty((3, *y.shape[:2]), dtype=torch.float64)

    @register("pooled_norm_backward")
    def _(dz, y, d_pooled, handoff, means, mean, var, weight, bias, eps, of_batch, needs):  # type: ignore[no-untyped-def]
        return (
            like(y) if needs[0] else y.new_empty(0),
            of_channels(weight) if needs[1] else y.new_empty(0),
            of_channels(bias) if needs[2] else y.new_empty(0),
        )


if load_error() is None:
    _register_fakes()
