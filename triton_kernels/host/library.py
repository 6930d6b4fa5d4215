"""The vendor's convolutions, where they are faster than a phase; each one ends the launch before it."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.spec import StageSpec


def convolution(p: Tensor, weight: Tensor, bias: Tensor | None, stage: StageSpec) -> Tensor:
    stride, padding, dilation = stage.geometry
    return torch.ops.aten.convolution(p, weight, bias, stride, padding, dilation, False, (0, 0), stage.groups)


def data_gradient(dy: Tensor, like: Tensor, weight: Tensor, stage: StageSpec) -> Tensor:
    """The gradient of a convolution's input; like: a tensor of its shape."""
    return _backward(dy, like, weight, stage, (True, False, False))[0]


def weight_gradient(dy: Tensor, p: Tensor, weight: Tensor, stage: StageSpec) -> Tensor:
    return _backward(dy, p, weight, stage, (False, True, False))[1]


def _backward(
    dy: Tensor, p: Tensor, weight: Tensor, stage: StageSpec, output_mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation = stage.geometry
    return torch.ops.aten.convolution_backward(
        dy, p, weight, None, stride, padding, dilation, False, (0, 0), stage.groups, output_mask
    )
