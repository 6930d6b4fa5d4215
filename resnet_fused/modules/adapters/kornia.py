"""Kornia's ResNets: LoFTR's and RT-DETR's backbones."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import chain, shortcut_or_none, skip_steps, with_skip
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    original_path,
    require_no_hooks,
)

CONV_NORM_ACT = "kornia.models.common.ConvNormAct"


def loftr_block(block: nn.Module) -> Modules:
    return with_skip(chain(block, ("relu", "relu")), block.downsample, in_place_add=False)  # type: ignore[arg-type]


def resnet_d_block(block: nn.Module) -> Modules:
    """arXiv:1812.01187: the skip path pools before its projection."""
    require_no_hooks("convs", block.convs)  # type: ignore[arg-type]
    stages = [_stage(f"convs.{name}", part) for name, part in block.convs.named_children()]  # type: ignore[union-attr]
    stages[-1] = replace(stages[-1], act=block.relu)  # type: ignore[arg-type]
    shortcut = shortcut_or_none(block.short)  # type: ignore[arg-type]
    if shortcut is None:
        return BlockModules(tuple(stages), "identity")
    if type(shortcut) is not nn.Sequential:
        return BlockModules(tuple(stages), "projection", _stage("short", shortcut))
    if len(shortcut) != 2:
        names = ", ".join(type(part).__name__ for part in shortcut)
        raise NotFusable(f"short is Sequential({names}); accepted: a pooling and ConvNormAct, ConvNormAct, nn.Identity")
    pool, conv = shortcut
    steps = skip_steps((pool,), _stage("short.conv", conv))
    return CompositeModules((), BlockModules(tuple(stages), "none"), steps)


def _stage(name: str, module: nn.Module) -> StageModules:
    if original_path(module) != CONV_NORM_ACT:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: ConvNormAct")
    return sequential.stage(name, module)


BLOCKS: dict[str, Adapter] = {
    "kornia.feature.loftr.backbone.resnet_fpn.BasicBlock": loftr_block,
    "kornia.models.rt_detr.architecture.resnet_d.BasicBlockD": resnet_d_block,
    "kornia.models.rt_detr.architecture.resnet_d.BottleneckD": resnet_d_block,
    CONV_NORM_ACT: sequential.layer,
}
LAYERS: tuple[str, ...] = (CONV_NORM_ACT,)
