"""InsightFace's IResNet, as the files of its arcface_torch are imported."""

from __future__ import annotations

import sys

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters.resnet import skip_parts, skip_steps
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    StageModules,
    StepModules,
)


def basic_block(block: nn.Module) -> CompositeModules:
    """arXiv:1801.07698: bn1, conv1, bn2, PReLU, conv2, bn3 beside x, and no activation behind the addition."""
    module = sys.modules.get(type(block).__module__)
    if getattr(module, "using_ckpt", False) and block.training:  # a constant of the file
        raise NotFusable(
            "using_ckpt is set: the block's own forward computes it again in backward; accepted in training: False"
        )
    first = StageModules(block.conv1, block.bn2, block.prelu)  # type: ignore[arg-type]
    end = BlockModules((first, StageModules(block.conv2, block.bn3, None)), "none", in_place_add=True)  # type: ignore[arg-type]
    skip: tuple[StepModules, ...] = ()
    if block.downsample is not None:
        skip = skip_steps(*skip_parts(block.downsample))  # type: ignore[arg-type]
    return CompositeModules((block.bn1,), end, skip)  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    f"{folder}.iresnet.IBasicBlock": basic_block for folder in ("backbones", "recognition.arcface_torch.backbones")
}
