"""timm's configurable blocks."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.modules.adapters.timm.attention import attention_of, both, drop_path_of
from resnet_fused.modules.adapters.timm.layers import attended, stage_of
from resnet_fused.modules.block_modules import Adapter, Modules


def bottleneck(block: nn.Module) -> Modules:
    """timm's configurable bottleneck (CLIP's ResNets, RegNet-Z's relatives, ResNet-33ts and others)."""
    names = ["conv1_1x1", "conv2_kxk", "conv2b_kxk", "conv3_1x1"]
    names = [name for name in names if type(getattr(block, name)) is not nn.Identity]
    stages = tuple(stage_of(name, getattr(block, name)) for name in names)
    last = replace(stages[-1], act=block.act)  # type: ignore[arg-type]
    attention = attention_of(block.attn, "attn")  # type: ignore[arg-type]
    gate = both(attention_of(block.attn_last, "attn_last"), drop_path_of(block.drop_path))  # type: ignore[arg-type]
    return attended((*stages[:-1], last), attention, gate, block.shortcut)  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "timm.models.byobnet.BottleneckBlock": bottleneck,
}
