"""timm's first SE-ResNets."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.adapters.timm.attention import attention_of
from resnet_fused.modules.block_modules import Adapter, BlockModules, CompositeModules, Modules, StepModules


def bottleneck(block: nn.Module) -> Modules:
    stages = chain(block, ("relu", "relu", "relu"))
    return with_skip(stages, block.downsample, gate=attention_of(block.se_module), in_place_add=False)  # type: ignore[arg-type]


def basic_block(block: nn.Module) -> Modules:
    """Its activation stands twice behind the last norm: before the attention and behind the addition."""
    whole = with_skip(chain(block, ("relu", "relu")), block.downsample, in_place_add=False)  # type: ignore[arg-type]
    pools: tuple[StepModules, ...] = ()
    if isinstance(whole, CompositeModules):
        end, pools = whole.blocks[0], whole.skip or ()
    else:
        end = whole
        pools = () if whole.projection is None else (BlockModules((whole.projection,), "none"),)
    end = replace(end, skip="none", projection=None, order="branch", gate=attention_of(block.se_module))  # type: ignore[arg-type]
    return CompositeModules((), end, pools, after=(block.relu,))  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "timm.models.senet.SEBottleneck": bottleneck,
    "timm.models.senet.SEResNetBottleneck": bottleneck,
    "timm.models.senet.SEResNeXtBottleneck": bottleneck,
    "timm.models.senet.SEResNetBlock": basic_block,
}
