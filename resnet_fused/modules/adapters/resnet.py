"""torchvision's ResNet parts, and this package's own, which have scales and orders beside the same children."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import BlockModules, StageModules, require_no_hooks
from resnet_fused.params import Scale


def basic_block(block: nn.Module) -> BlockModules:
    return chain(block, acts=("relu", "relu"))


def bottleneck(block: nn.Module) -> BlockModules:
    return chain(block, acts=("relu", "relu", "relu"))


def own_basic_block(block: nn.Module) -> BlockModules:
    return _scaled(block, basic_block(block))


def own_bottleneck(block: nn.Module) -> BlockModules:
    return _scaled(block, bottleneck(block))


def pre_basic_block(block: nn.Module) -> BlockModules:
    return _pre_activation(block, convs=2)


def pre_bottleneck(block: nn.Module) -> BlockModules:
    return _pre_activation(block, convs=3)


def stem(model: nn.Module) -> BlockModules:
    """conv1, bn1 and relu; the pooling that follows is `resnet_fused.modules.stem`'s."""
    return BlockModules((_stage(model, 1, "relu"),), skip="none")


def chain(block: nn.Module, acts: tuple[str, ...]) -> BlockModules:
    """conv1, bn1, acts[0], conv2, ... and the skip path `downsample`."""
    stages = tuple(_stage(block, i, act) for i, act in enumerate(acts, start=1))
    if block.downsample is None:
        return BlockModules(stages, skip="identity", in_place_add=True)
    projection = _projection(block.downsample)  # type: ignore[arg-type]
    return BlockModules(stages, skip="projection", projection=projection, in_place_add=True)


def _pre_activation(block: nn.Module, convs: int) -> BlockModules:
    """bn1, relu, conv1, bn2, ...; without `bn1` the input is activated already."""
    stages = [_stage(block, i, "relu") for i in range(1, convs + 1)]
    if block.bn1 is None:
        stages[0] = replace(stages[0], act=None)
    projection = None
    if block.downsample is not None:
        projection = _projection(block.downsample)  # type: ignore[arg-type]
        if projection.norm is not None:
            raise NotFusable("downsample has a norm; accepted in pre-activation order: nn.Sequential(conv)")
    skip = "identity" if projection is None else "projection"
    return _scaled(block, BlockModules(tuple(stages), skip, projection, order="pre", in_place_add=True))  # type: ignore[arg-type]


def _scaled(block: nn.Module, modules: BlockModules) -> BlockModules:
    """With the scales of this package's blocks, or without their skip path."""
    modules = replace(modules, branch_scale=_scale(block.branch_scale))  # type: ignore[arg-type]
    if not block.skip:
        return replace(modules, skip="none", projection=None)
    return replace(modules, skip_scale=_scale(block.skip_scale))  # type: ignore[arg-type]


def _scale(value: Scale) -> Scale:
    return value if isinstance(value, Tensor) else float(value)


def _stage(module: nn.Module, i: int, act: str) -> StageModules:
    return StageModules(getattr(module, f"conv{i}"), getattr(module, f"bn{i}"), getattr(module, act))


def _projection(downsample: nn.Module) -> StageModules:
    require_no_hooks("downsample", downsample)
    parts = list(downsample.children())
    for part in parts:
        require_no_hooks("a part of downsample", part)
    parts = [part for part in parts if type(part) is not nn.Identity]
    if type(downsample) is not nn.Sequential or len(parts) not in (1, 2):
        names = ", ".join(type(part).__name__ for part in parts)
        raise NotFusable(f"downsample is {type(downsample).__name__}({names}); accepted: nn.Sequential(conv, norm)")
    return StageModules(parts[0], parts[1] if len(parts) == 2 else None, act=None)
