"""The operators of a gated join, act((y - center) * scale + shift + skip) per image: typed calls, fake kernels.

Schemas stand in csrc/ops/gated_join.cpp; the kernels are csrc/cpu's.

x, y, skip, dout, out, dz, dy: [N, C, H, W] of one dtype, any strides, not empty; results are channels_last.
affine:                        [N, 3, C]: center, scale and shift for each image, float32 (float64 for float64).
slope:                         [1] or [C], of an activation that learns one.
The operators but `gate_` are functional: nothing is written in place, no output aliases an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops.gate import GateLayer
from resnet_fused.ops.operators import load_error, require
from resnet_fused.spec import Activation


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """In which per-channel values are computed and kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def image_statistics(x: Tensor) -> Tensor:
    """[N, 2, C]: mean and biased variance of each image, in `arithmetic_dtype`."""
    require()
    return torch.ops.resnet_fused.image_statistics.default(x)


def gated_join(y: Tensor, affine: Tensor, skip: Tensor | None, act: Activation, slope: Tensor | None) -> Tensor:
    require()
    return torch.ops.resnet_fused.gated_join.default(y, affine, skip, act.code, act.parameter, slope)


def gate_(y: Tensor, skip: Tensor | None, layers: Sequence[GateLayer], act: Activation, slope: Tensor | None) -> None:
    """y := act(gate(the mean of y over pixels) * y + skip); y is channels_last. The one operator that writes."""
    require()
    weights, biases, acts = map(list, zip(*layers, strict=True))
    torch.ops.resnet_fused.gate_.default(y, skip, weights, biases, acts, act.code, act.parameter, slope)


def gated_join_backward_reduce(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    affine: Tensor,
    skip: Tensor | None,
    act: Activation,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(sums, dz), where dz = dout * act'; it is [0] for the identity, whose dz is dout.

    sums: [N, 2, C] float64: of dz and of dz * (y - center); with a slope [N, 3, C], its gradient's last.
    out:  forward's, where the derivative follows from it (`Activation.reads` is "output"); then skip is not read.
    """
    require()
    return torch.ops.resnet_fused.gated_join_backward_reduce.default(
        dout, out, y, affine, skip, act.code, act.parameter, slope
    )


def gated_join_backward_apply(dz: Tensor, y: Tensor | None, coefficients: Tensor) -> Tensor:
    """dy = k_dz * dz + k_y * (y - center) + k; coefficients: [N, 4, C], center, k_dz, k_y and k for each image.

    y: None where k_y and k do not count.
    """
    require()
    return torch.ops.resnet_fused.gated_join_backward_apply.default(dz, y, coefficients)


def _register_fakes() -> None:
    def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return torch.library.register_fake(f"resnet_fused::{name}")

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    @register("image_statistics")
    def _(x):  # type: ignore[no-untyped-def]
        return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=arithmetic_dtype(x))

    @register("gated_join")
    def _(y, affine, skip, act, parameter, slope):  # type: ignore[no-untyped-def]
        return like(y)

    @register("gate_")
    def _(y, skip, weights, biases, acts, act, parameter, slope):  # type: ignore[no-untyped-def]
        return None

    @register("gated_join_backward_reduce")
    def _(dout, out, y, affine, skip, act, parameter, slope):  # type: ignore[no-untyped-def]
        sums = y.new_empty((y.shape[0], 2 if slope is None else 3, y.shape[1]), dtype=torch.float64)
        return sums, like(y) if act else y.new_empty(0)  # code 0: the identity

    @register("gated_join_backward_apply")
    def _(dz, y, coefficients):  # type: ignore[no-untyped-def]
        return like(dz)


if load_error() is None:
    _register_fakes()
