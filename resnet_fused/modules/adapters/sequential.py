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
ALONE = "a layer on its own is faster in PyTorch; accepted: a convolution of one group, norm and ReLU"


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

    Of torchvision's mobilenet_v2 at batch 4, whose layers end in ReLU6 or nothing and are often depthwise, a bfloat16
    training step took 1.6 times eager's, float32 evaluation 1.2 times (AMD EPYC, two threads).
    """
    norm: Any = stage.norm
    act = recognise(norm.act if hasattr(norm, "act") else stage.act)
    return getattr(stage.conv, "groups", 1) == 1 and act == RELU


def chains(modules: list[nn.Module]) -> tuple[StepModules, ...]:
    """Modules that are called one after the other, with each run of conv, norm and activation as one fused chain.

    Layers and plain nn.Sequentials among them are opened, unless they have hooks. A single stage that PyTorch runs
    faster is called as it is.
    """
    steps: list[StepModules] = []
    run: list[tuple[StageModules, list[nn.Module]]] = []  # each stage with what computes it in the model

    def close() -> None:
        if len(run) == 1 and not gains(run[0][0]):
            steps.extend(run[0][1])
        elif run:
            steps.append(BlockModules(tuple(stage for stage, _ in run), "none"))
        run.clear()

    waiting = _opened(modules)
    while waiting:
        single = _of_layer(waiting[0])
        found, length = (single[0], 1) if single is not None else _stage(waiting)
        if found is not None:
            run.append((found, waiting[:length]))
        blur = None if single is None else single[1]
        if found is None or blur is not None:
            fused = len(run) > 1 or any(gains(stage) for stage, _ in run)
            close()
            if found is None:
                steps.append(waiting[0])
            elif blur is not None and fused:
                steps.append(blur)
        waiting = waiting[length:]
    close()
    return tuple(steps)


def _opened(modules: list[nn.Module]) -> list[nn.Module]:
    """Without plain nn.Sequentials, in place of which stands what they hold, and without what does nothing."""
    opened: list[nn.Module] = []
    for module in modules:
        if type(module) is nn.Sequential and not has_hooks(module):
            opened += _opened(list(module.children()))
        elif type(module) is not nn.Identity or has_hooks(module):
            opened.append(module)
    return opened


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
