"""Containers that call their children in order: chains of convolution, norm and activation, and what stands between."""

from __future__ import annotations

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

    Of torchvision's mobilenet_v2 at batch 4, whose layers end in ReLU6 or nothing and are often depthwise, a bfloat16
    training step took 1.6 times eager's, float32 evaluation 1.2 times (AMD EPYC, two threads).
    """
    norm: Any = stage.norm
    act = recognise(norm.act if hasattr(norm, "act") else stage.act)
    if getattr(stage.conv, "groups", 1) != 1 or act != RELU:
        raise NotFusable("a layer on its own is faster in PyTorch; accepted: a convolution of one group, norm and ReLU")


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
