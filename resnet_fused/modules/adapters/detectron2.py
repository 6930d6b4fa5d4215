"""detectron2's ResNets, whose convolutions hold their norm (`block_modules.CONV_NORM_ACT`)."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import Adapter, BlockModules, CompositeModules, StageModules


def basic_block(block: nn.Module) -> BlockModules:
    return _block(block, convs=2)


def bottleneck(block: nn.Module) -> BlockModules:
    return _block(block, convs=3)


def deformable_bottleneck(block: nn.Module) -> BlockModules:
    raise NotFusable(
        f"conv2 is {type(block.conv2).__name__}, which reads its input at learned offsets; accepted: a block with "
        "ordinary convolutions"
    )


def stem(module: nn.Module) -> CompositeModules:
    stage = StageModules(module.conv1, None, F.relu)  # type: ignore[arg-type]
    pool = partial(F.max_pool2d, kernel_size=3, stride=2, padding=1)
    return CompositeModules((BlockModules((stage,), "none"), pool))


def _block(block: nn.Module, convs: int) -> BlockModules:
    stages = tuple(StageModules(getattr(block, f"conv{i}"), None, F.relu) for i in range(1, convs + 1))
    if block.shortcut is None:
        return BlockModules(stages, "identity", in_place_add=True)
    return BlockModules(stages, "projection", StageModules(block.shortcut, None, None), in_place_add=True)  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "detectron2.modeling.backbone.resnet.BasicBlock": basic_block,
    "detectron2.modeling.backbone.resnet.BottleneckBlock": bottleneck,
    "detectron2.modeling.backbone.resnet.DeformBottleneckBlock": deformable_bottleneck,
    "detectron2.modeling.backbone.resnet.BasicStem": stem,
}
