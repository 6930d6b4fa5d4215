"""The operators of act(batch_norm(x) + residual): typed calls, fake kernels.

Schemas stand in csrc/ops/batch_norm_act.h.

x, residual, dout, out, dx, dz: [N, C, H, W] of one dtype; results are channels_last where x is, else contiguous.
mean, var, weight, bias:        [C], x's dtype or float32 (float64 for float64).
mask:                           uint8 [N * H * W, ceil(C / 8)]: bit c % 8 of byte c // 8 is set where the activation
                                passes the gradient, which is where its output is not <= 0; bits beyond C are 0.
The operators are functional: nothing is written in place, no output aliases an input. x is not empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.ops.operators import load_error, require


def batch_statistics(x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance, float32 (float64 for float64)."""
    require()
    return torch.ops.resnet_fused.batch_statistics.default(x)


def normalize_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """(act((x - mean) / sqrt(var + eps) * weight + bias + residual), mask); the mask is [0] where it is not saved."""
    require()
    return torch.ops.resnet_fused.normalize_act.default(x, mean, var, weight, bias, residual, eps, relu, save_mask)


def normalize_act_backward_reduce(dout: Tensor, mask: Tensor | None, x: Tensor, mean: Tensor) -> Tensor:
    """[2, C] float64: the sums of dz and of dz * (x - mean); dz is dout where the mask is set, dout without one."""
    require()
    return torch.ops.resnet_fused.normalize_act_backward_reduce.default(dout, mask, x, mean)


def normalize_act_backward_apply(
    dout: Tensor,
    mask: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    save_dz: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dz); dz, the residual's gradient, is [0] where it is not saved.

    sums:  as the reduction returns them, maybe added up over several processes, with the count of values per channel
           behind them: dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)). None: the statistics are constants,
           dx = scale * dz, and of x only the shape and memory format count.
    """
    require()
    return torch.ops.resnet_fused.normalize_act_backward_apply.default(
        dout, mask, x, mean, var, weight, sums, count, eps, save_dz
    )


def _register_fakes() -> None:
    def register(name: str) -> Callable[[Callable[..., Any]], None]:
        def both(fake: Callable[..., Any]) -> None:
            for overload in ("", ".cuda"):
                torch.library.register_fake(f"resnet_fused::{name}{overload}", fake)

        return both

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))

    @register("batch_statistics")
    def _(x):  # type: ignore[no-untyped-def]
        return x.new_empty((2, x.shape[1]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    @register("normalize_act")
    def _(x, mean, var, weight, bias, residual, eps, relu, save_mask):  # type: ignore[no-untyped-def]
        n, c, h, w = x.shape
        return like(x), x.new_empty((n * h * w, (c + 7) // 8) if save_mask else (0,), dtype=torch.uint8)

    @register("normalize_act_backward_reduce")
    def _(dout, mask, x, mean):  # type: ignore[no-untyped-def]
        return x.new_empty((2, x.shape[1]), dtype=torch.float64)

    @register("normalize_act_backward_apply")
    def _(dout, mask, x, mean, var, weight, sums, count, eps, save_dz):  # type: ignore[no-untyped-def]
        return like(x), like(x) if save_dz else x.new_empty(0)


if load_error() is None:
    _register_fakes()
