"""Containers that call their children in order: chains of convolution, norm and activation, and what stands between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    StageModules,
    StepModules,
    has_hooks,
    is_norm,
    original_path,
    require_no_hooks,
)
from resnet_fused.spec.activations import RELU, recognise

CONV_NORM_ACT = "timm.layers.conv_bn_act.ConvNormAct"
# containers that hold a convolution, its norm with an activation or before one, and perhaps what blurs
SINGLE: tuple[str, ...] = (CONV_NORM_ACT, "torchvision.ops.misc.Conv2dNormActivation")
# those of a convolution and a norm, whose forward ends in F.relu
BASIC: tuple[str, ...] = ("torchvision.models.googlenet.BasicConv2d", "torchvision.models.inception.BasicConv2d")
FEW_TAPS = 9  # up to which a depthwise weight gradient is oneDNN's (csrc/cpu/depthwise.cpp)
ALONE = (
    "a layer on its own is faster in PyTorch; accepted: a convolution of one group, norm and ReLU, or a depthwise "
    f"convolution of more than {FEW_TAPS} taps"
)
Layer = Callable[[nn.Module], BlockModules | None]


def chain(container: nn.Module) -> BlockModules | CompositeModules:
    """Of an nn.Sequential, or a subclass that keeps its forward. Convolutions without a norm are called as they are."""
    if getattr(type(container), "forward", None) is not nn.Sequential.forward and not _is_fused(container):
        raise NotFusable(f"{type(container).__name__} has a forward of its own; accepted: nn.Sequential's")
    steps = chains(list(container.children()))
    if len(steps) == 1 and isinstance(steps[0], BlockModules):
        return steps[0]
    return composite(steps)


def composite(steps: tuple[StepModules, ...]) -> CompositeModules:
    """Steps that are taken one after the other. Raises NotFusable where none is a fused call."""
    whole = CompositeModules(steps)
    if not whole.blocks:
        follows = any(is_norm(part) for step in whole.called for part in step.modules())
        raise NotFusable(ALONE if follows else "no convolution is followed by a batch norm")
    return whole


def layer(container: nn.Module) -> BlockModules:
    """A single stage on its own, such as torchvision's Conv2dNormActivation."""
    found = stage("it", container)
    require_gain(found)
    return BlockModules((found,), "none")


def basic(module: nn.Module) -> StageModules:
    """Of the Inceptions' BasicConv2d, a stage whose activation is a function."""
    return StageModules(module.conv, module.bn, "relu")  # type: ignore[arg-type]


def require_gain(stage: StageModules) -> None:
    """Raises NotFusable for a single stage that PyTorch runs faster: there is no block around it to save passes in."""
    if not gains(stage):
        raise NotFusable(ALONE)


def gains(stage: StageModules) -> bool:
    """Whether a single stage, fused, is faster than PyTorch's.

    Of layers that torchvision's networks hold, at batch 4, those that end in another activation than ReLU or in none
    took 1.05 to 1.3 times eager's time in a training step, and 0.6 to 1.2 times in evaluation; a depthwise 5 x 5 layer
    0.75 times in float32 and 0.14 times in bfloat16, by its weight gradient (torch 2.13, AMD Zen 5, two threads).
    """
    norm: Any = stage.norm
    act = recognise(norm.act if hasattr(norm, "act") else stage.act)
    plain = getattr(stage.conv, "groups", 1) == 1 and act == RELU
    return plain or _has_gradient_of_its_own(stage.conv)


def _has_gradient_of_its_own(conv: Any) -> bool:
    depthwise = type(conv) is nn.Conv2d and 1 < conv.groups == conv.in_channels == conv.out_channels
    return depthwise and math.prod(conv.kernel_size) > FEW_TAPS


def _chain_gains(stages: tuple[StageModules, ...], *, pooled: bool) -> bool:
    if len(stages) == 1:
        return pooled or gains(stages[0])
    return all(getattr(stage.conv, "groups", 1) == 1 or _has_gradient_of_its_own(stage.conv) for stage in stages)


def chains(
    modules: list[nn.Module], layer: Layer = lambda _: None, *, within_block: bool = False
) -> tuple[StepModules, ...]:
    """Modules that are called one after the other, with each run of conv, norm and activation as one fused chain.

    Layers and plain nn.Sequentials of layers among them are opened, unless they have hooks. A single stage that PyTorch
    runs faster is called as it is, unless the chain is part of a block, or a max pooling follows, which the fused call
    takes with it. So are chains of grouped convolutions.

    layer: names the parts of further layers.
    """
    steps: list[StepModules] = []
    run: list[tuple[StageModules, list[nn.Module]]] = []  # each stage with what computes it in the model

    def close(following: nn.Module | None = None) -> None:
        stages = tuple(stage for stage, _ in run)
        if not within_block and not _chain_gains(stages, pooled=type(following) is nn.MaxPool2d):
            steps.extend(dict.fromkeys(part for _, parts in run for part in parts))
        elif run:
            steps.append(BlockModules(stages, "none"))
        run.clear()

    waiting = opened(modules)
    while waiting:
        known = layer(waiting[0])
        if known is not None:
            run += [(stage, waiting[:1]) for stage in known.stages]
            waiting = waiting[1:]
            continue
        single = _of_layer(waiting[0])
        found, length = (single[0], 1) if single is not None else _stage(waiting)
        if found is not None:
            run.append((found, waiting[:length]))
        blur = None if single is None else single[1]
        if found is None or blur is not None:
            close(waiting[0] if found is None else blur)
            if found is None:
                steps.append(waiting[0])
            elif blur is not None and isinstance(steps[-1], BlockModules):
                steps.append(blur)
        waiting = waiting[length:]
    close()
    return tuple(steps)


def is_network(module: nn.Module) -> bool:
    """Whether it is more than a single layer, or a plain nn.Sequential of single layers."""
    if is_norm(module) or original_path(module) in (*SINGLE, *BASIC) or not any(True for _ in module.children()):
        return False
    if (type(module) is not nn.Sequential and not _is_fused(module)) or has_hooks(module):
        return True
    return any(map(is_network, module.children()))


def opened(modules: list[nn.Module]) -> list[nn.Module]:
    """Without plain nn.Sequentials of layers, in place of which stands what they hold, and what does nothing."""
    flat: list[nn.Module] = []
    for module in modules:
        if (type(module) is nn.Sequential or _is_fused(module)) and not is_network(module):
            flat += opened(list(module.children()))
        elif type(module) is not nn.Identity or has_hooks(module):
            flat.append(module)
    return flat


def _of_layer(module: nn.Module) -> tuple[StageModules, nn.Module | None] | None:
    """(the stage of a layer, what blurs behind it)."""
    if original_path(module) not in (*SINGLE, *BASIC) or has_hooks(module):
        return None
    if original_path(module) in BASIC:
        return basic(module), None
    children = list(module.children())
    found, length = _stage(children)
    rest = children[length:]
    return None if found is None or len(rest) > 1 else (found, rest[0] if rest else None)


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
