"""Containers that call their children in order: chains of convolution, norm and activation, and what stands between."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    StageModules,
    StepModules,
    is_norm,
    require_no_hooks,
)
from resnet_fused.spec.activations import RELU, recognise

FEW_TAPS = 9  # up to which a depthwise weight gradient is oneDNN's (csrc/cpu/depthwise.cpp)


def chain(container: nn.Module) -> BlockModules | CompositeModules:
    """Of an nn.Sequential, or a subclass that keeps its forward. Convolutions without a norm are called as they are."""
    if getattr(type(container), "forward", None) is not nn.Sequential.forward and not _is_fused(container):
        raise NotFusable(f"{type(container).__name__} has a forward of its own; accepted: nn.Sequential's")
    steps = chains(list(container.children()))
    if not any(isinstance(step, BlockModules) for step in steps):
        raise NotFusable("no convolution is followed by a batch norm")
    if len(steps) == 1 and isinstance(steps[0], BlockModules):
        return steps[0]
    return CompositeModules(steps)


def layer(container: nn.Module) -> BlockModules:
    """A single stage on its own, such as torchvision's Conv2dNormActivation."""
    found = stage("it", container)
    require_gain(found)
    return BlockModules((found,), "none")


def require_gain(stage: StageModules) -> None:
    """Raises NotFusable for a single stage that PyTorch runs faster: there is no block around it to save passes in.

    Of layers that torchvision's networks hold, at batch 4, those that end in another activation than ReLU or in none
    took 1.05 to 1.3 times eager's time in a training step, and 0.6 to 1.2 times in evaluation; a depthwise 5 x 5 layer
    0.75 times in float32 and 0.14 times in bfloat16, by its weight gradient (torch 2.13, AMD Zen 5, two threads).
    """
    norm: Any = stage.norm
    act = recognise(norm.act if hasattr(norm, "act") else stage.act)
    plain = getattr(stage.conv, "groups", 1) == 1 and act == RELU
    if not plain and not _has_gradient_of_its_own(stage.conv):
        raise NotFusable(
            "a layer on its own is faster in PyTorch; accepted: a convolution of one group, norm and ReLU, or a "
            f"depthwise convolution of more than {FEW_TAPS} taps"
        )


def _has_gradient_of_its_own(conv: Any) -> bool:
    depthwise = type(conv) is nn.Conv2d and 1 < conv.groups == conv.in_channels == conv.out_channels
    return depthwise and math.prod(conv.kernel_size) > FEW_TAPS


def chains(modules: list[nn.Module]) -> tuple[StepModules, ...]:
    """Modules that are called one after the other, with each run of conv, norm and activation as one fused chain."""
    steps: list[StepModules] = []
    i = 0
    while i < len(modules):
        stage, length = _stage(modules[i:])
        if stage is None:
            steps.append(modules[i])
        elif steps and isinstance(steps[-1], BlockModules):
            steps[-1] = BlockModules((*steps[-1].stages, stage), "none")
        else:
            steps.append(BlockModules((stage,), "none"))
        i += length
    return tuple(steps)


def stage(name: str, container: nn.Module) -> StageModules:
    """Of a container that is a single stage, such as torchvision's Conv2dNormActivation."""
    require_no_hooks(name, container)
    modules = list(container.children())
    found, length = _stage(modules)
    if found is None or length != len(modules):
        parts = ", ".join(type(part).__name__ for part in modules)
        raise NotFusable(f"{name} is {type(container).__name__}({parts}); accepted: a convolution, norm and activation")
    return found


def _stage(modules: list[nn.Module]) -> tuple[StageModules | None, int]:
    """The stage at the head, if there is one, and how many modules it is."""
    if len(modules) < 2 or not isinstance(modules[0], nn.Conv2d) or not is_norm(modules[1]):
        return None, 1
    if len(modules) > 2 and not isinstance(modules[2], nn.Conv2d) and recognise(modules[2]) is not None:
        return StageModules(*modules[:3]), 3
    return StageModules(modules[0], modules[1], None), 2


def _is_fused(container: nn.Module) -> bool:
    """Its class is then fused_block's, whose forward falls back on the original's."""
    original = getattr(type(container), "_fused_from", None)
    return original is not None and original.forward is nn.Sequential.forward
