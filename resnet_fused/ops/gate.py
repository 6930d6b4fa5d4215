"""The factor of a block's branch for each image and channel: squeeze-excitation, ECA, stochastic depth, a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# The factor itself; or what computes it from the mean of each channel of each image [N, C].
Gate = Tensor | Callable[[Tensor], Tensor]
LayerActivation = Literal["identity", "relu", "silu", "hardswish", "sigmoid", "hardsigmoid"]  # csrc/cpu/gate.cpp


class GateLayer(NamedTuple):
    """One layer on [N, C], then an activation.

    weight: [out, in] or [out, in, 1, 1], linear; [1, 1, k], a convolution over neighbouring channels.
    """

    weight: Tensor
    bias: Tensor | None
    act: LayerActivation


@dataclass(frozen=True)
class LayeredGate:
    """A gate whose layers are known, so that evaluation computes them in the join's call (`join_operators.gate_`).

    compute: the same from the mean over pixels, in PyTorch.
    """

    compute: Callable[[Tensor], Tensor]
    layers: tuple[GateLayer, ...]

    def __call__(self, pooled: Tensor) -> Tensor:
        return self.compute(pooled)

    def reads(self, y: Tensor) -> bool:
        """Whether `gate_` computes them for a branch like y: plain tensors on y's device, of y's dtype.

        Where that is autocast's they may be float32, and are rounded as autocast does.
        """
        if forward_ad._current_level >= 0:
            return False
        device = y.device
        narrowed = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == y.dtype
        accepted = (y.dtype, torch.float32) if narrowed else (y.dtype,)
        tensors = [t for layer in self.layers for t in (layer.weight, layer.bias) if t is not None]
        return all(type(t) in (Tensor, nn.Parameter) and t.dtype in accepted and t.device == device for t in tensors)


def per_channel(factor: object, branch: Tensor) -> Tensor:
    """`factor` as [N, C] for a branch [N, C, H, W]; raises TypeError, ValueError.

    factor: [N, C], [N, 1], [1, C] or [N], with or without two axes of one pixel behind.
    """
    if not isinstance(factor, Tensor):
        raise TypeError(f"the gate must be a tensor or a function that returns one, got {type(factor).__name__}")
    if not factor.is_floating_point():
        raise TypeError(f"the gate is {factor.dtype}; accepted: floating point")
    if factor.device != branch.device:
        raise ValueError(f"x is on {branch.device} but the gate is on {factor.device}; move one of them")
    images, channels = branch.shape[:2]
    shape = tuple(factor.shape[:-2]) if factor.dim() == 4 and factor.shape[2:] == (1, 1) else tuple(factor.shape)
    if shape == (images,):
        shape = (images, 1)
    if len(shape) != 2 or shape[0] not in (1, images) or shape[1] not in (1, channels):
        raise ValueError(
            f"the gate is {tuple(factor.shape)}; accepted for {images} images of {channels} channels: "
            f"[{images}, {channels}], [{images}, 1], [1, {channels}] or [{images}]"
        )
    return factor.reshape(shape).expand(images, channels)
