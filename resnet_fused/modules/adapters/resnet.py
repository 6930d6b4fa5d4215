"""torchvision's ResNet parts and this package's own, which have the same children."""

from __future__ import annotations

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import BlockModules, StageModules, require_no_hooks


def basic_block(block: nn.Module) -> BlockModules:
    return chain(block, acts=("relu", "relu"))


def bottleneck(block: nn.Module) -> BlockModules:
    return chain(block, acts=("relu", "relu", "relu"))


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


def _stage(module: nn.Module, i: int, act: str) -> StageModules:
    return StageModules(getattr(module, f"conv{i}"), getattr(module, f"bn{i}"), getattr(module, act))


def _projection(downsample: nn.Module) -> StageModules:
    require_no_hooks("downsample", downsample)
    parts = list(downsample.children())
    for part in parts:
        require_no_hooks("a part of downsample", part)
    parts = [part for part in parts if type(part) is not nn.Identity]
    if type(downsample) is not nn.Sequential or len(parts) != 2:
        names = ", ".join(type(part).__name__ for part in parts)
        raise NotFusable(f"downsample is {type(downsample).__name__}({names}); accepted: nn.Sequential(conv, norm)")
    return StageModules(conv=parts[0], norm=parts[1], act=None)
