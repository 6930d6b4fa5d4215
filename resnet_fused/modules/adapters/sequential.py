"""Containers that call their children in order: chains of convolution, norm and activation, and what stands between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Part = nn.Module | BlockModules  # what is called; a known layer with its parts named


def chain(container: nn.Module) -> BlockModules | CompositeModules:
    """Of an nn.Sequential, or a subclass that keeps its forward. Convolutions without a norm are called as they are."""
    if getattr(type(container), "forward", None) is not nn.Sequential.forward and not _is_fused(container):
        raise NotFusable(f"{type(container).__name__} has a forward of its own; accepted: nn.Sequential's")
    steps = fusable(flatten(list(container.children())))
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


def flatten(modules: list[nn.Module], layer: Callable[[nn.Module], BlockModules | None] = lambda _: None) -> list[Part]:
    """With what a plain nn.Sequential of single layers holds in its place, and known layers as `layer` gives them."""
    flat: list[Part] = []
    for module in modules:
        flat += _leaves(module, layer) or [module]
    return flat


def is_network(module: nn.Module) -> bool:
    """Whether it is more than a single layer, or a plain nn.Sequential of single layers."""
    return _leaves(module, lambda _: None) is None


def _leaves(module: nn.Module, layer: Callable[[nn.Module], BlockModules | None]) -> list[Part] | None:
    """None for a module with parts of its own, which is called as it is."""
    known = layer(module)
    if known is not None:
        return [known]
    if is_norm(module) or not any(True for _ in module.children()):
        return [module]
    if type(module) is not nn.Sequential and not _is_fused(module):
        return None
    try:
        require_no_hooks("it", module)
    except NotFusable:
        return None
    leaves: list[Part] = []
    for child in module.children():
        of_child = _leaves(child, layer)
        if of_child is None:
            return None
        leaves += of_child
    return leaves


def fusable(modules: list[Part]) -> tuple[StepModules, ...]:
    """`chains`, of which those are fused that gain by it. Raises NotFusable where there is none."""
    found = chains(modules)
    steps: list[StepModules] = []
    reason = NotFusable("no convolution is followed by a batch norm")
    for step, following in zip(found, (*found[1:], None), strict=False):
        if not isinstance(step, BlockModules):
            steps.append(step)
            continue
        try:
            _require_gain_of_chain(step, pooled=type(following) is nn.MaxPool2d)
            steps.append(step)
        except NotFusable as refusal:
            reason = refusal
            parts = [part for stage in step.stages for part in (stage.conv, stage.norm, stage.act) if part is not None]
            steps += [part for part in parts if isinstance(part, nn.Module)]
    if not any(isinstance(step, BlockModules) for step in steps):
        raise reason
    return tuple(steps)


def _require_gain_of_chain(chain: BlockModules, *, pooled: bool) -> None:
    """Raises NotFusable where PyTorch runs the convolutions faster, as `require_gain` says of one; one whose result is
    pooled in the same call gains whatever its activation."""
    if len(chain.stages) == 1 and not pooled:
        require_gain(chain.stages[0])
    elif any(getattr(stage.conv, "groups", 1) != 1 for stage in chain.stages):
        raise NotFusable("a chain with a grouped convolution is faster in PyTorch; accepted: convolutions of one group")


def chains(modules: Sequence[Part]) -> tuple[StepModules, ...]:
    """Modules that are called one after the other, with each run of conv, norm and activation as one fused chain."""
    steps: list[StepModules] = []
    i = 0
    while i < len(modules):
        part = modules[i]
        stages, length = part.stages if isinstance(part, BlockModules) else (), 1
        if not stages:
            stages, length = _stage(modules[i : i + 3])
        if not stages:
            steps.append(part)
        elif steps and isinstance(steps[-1], BlockModules):
            steps[-1] = BlockModules((*steps[-1].stages, *stages), "none")
        else:
            steps.append(part if isinstance(part, BlockModules) else BlockModules(stages, "none"))
        i += length
    return tuple(steps)


def stage(name: str, container: nn.Module) -> StageModules:
    """Of a container that is a single stage, such as torchvision's Conv2dNormActivation."""
    require_no_hooks(name, container)
    modules = list(container.children())
    found, length = _stage(modules)
    if not found or length != len(modules):
        parts = ", ".join(type(part).__name__ for part in modules)
        raise NotFusable(f"{name} is {type(container).__name__}({parts}); accepted: a convolution, norm and activation")
    return found[0]


def _stage(modules: Sequence[Part]) -> tuple[tuple[StageModules, ...], int]:
    """The stage at the head, if there is one, and how many modules it is."""
    conv, norm, act = (*modules[:3], None, None)[:3]
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.Module) or not is_norm(norm):
        return (), 1
    if isinstance(act, nn.Module) and not isinstance(act, nn.Conv2d) and recognise(act) is not None:
        return (StageModules(conv, norm, act),), 3
    return (StageModules(conv, norm, None),), 2


def _is_fused(container: nn.Module) -> bool:
    """Its class is then fused_block's, whose forward falls back on the original's."""
    original = getattr(type(container), "_fused_from", None)
    return original is not None and original.forward is nn.Sequential.forward
