"""timm's Res2Nets, arXiv:1904.01169, and the bottlenecks of its deep layer aggregation that are made the same way."""

from __future__ import annotations

from typing import Any

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import with_skip
from resnet_fused.modules.adapters.timm.attention import gate_and_tail
from resnet_fused.modules.adapters.timm.resnet import does_nothing
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    Modules,
    SplitModules,
    StageModules,
    StepModules,
    require_no_hooks,
)


def bottleneck(block: Any) -> Modules:
    gate, tail = gate_and_tail(block.se, block.drop_path, "se")
    drop_block = () if does_nothing(block.drop_block) else (block.drop_block,)
    last = StageModules(block.conv3, block.bn3, block.relu)
    return with_skip((last,), block.downsample, branch=(*_middle(block), *drop_block), gate=gate, tail=tail)


def aggregated_bottleneck(block: Any) -> Modules:
    """DLA's, without attention."""
    return with_skip((StageModules(block.conv3, block.bn3, block.relu),), None, branch=_middle(block))


def _middle(block: Any) -> tuple[StepModules, ...]:
    """conv1, then a 3x3 convolution for all shares of the channels but the last, which passes by or is pooled.

    Where the block keeps its input's size the convolutions are a cascade.
    """
    if block.scale < 2:
        raise NotFusable(f"it has scale {block.scale}; accepted: two shares of the channels or more")
    for name in ("convs", "bns"):
        require_no_hooks(name, getattr(block, name))
    paths = [sequential.chains([conv, bn, block.relu]) for conv, bn in zip(block.convs, block.bns, strict=True)]
    last = () if block.pool is None else (block.pool,)
    first = BlockModules((StageModules(block.conv1, block.bn1, block.relu),), "none")
    return first, SplitModules((*paths, last), cascade=0 if block.is_first else len(paths))


BLOCKS: dict[str, Adapter] = {
    "timm.models.res2net.Bottle2neck": bottleneck,
    "timm.models.dla.DlaBottle2neck": aggregated_bottleneck,
}
