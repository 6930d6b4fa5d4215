"""timm's RegNets, X to Z and their pre-activation form."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.modules.adapters.resnet import skip_steps
from resnet_fused.modules.adapters.timm.attention import attention_of, drop_path_of, factor_or_module
from resnet_fused.modules.adapters.timm.layers import parts_of, shortcut_parts, stage_of, with_shortcut
from resnet_fused.modules.adapters.timm.resnetv2 import behind_first_norm
from resnet_fused.modules.block_modules import Adapter, BlockModules, CompositeModules, Modules, StepModules


def bottleneck(block: nn.Module) -> Modules:
    """Designing Network Design Spaces, arXiv:2003.13678; the attention stands before the last convolution."""
    first, second = (parts_of(f"conv{i}", getattr(block, f"conv{i}")) for i in (1, 2))
    last = stage_of("conv3", block.conv3)  # type: ignore[arg-type]
    drop_path = None if block.downsample is None else block.drop_path
    parts = (*first, *second, factor_or_module(block.se, "se"), last)  # type: ignore[arg-type]
    return with_shortcut(parts, block.downsample, act=block.act3, drop_path=drop_path)  # type: ignore[arg-type]


def pre_bottleneck(block: nn.Module) -> Modules:
    """The skip path reads what norm1 gives, even where it is the identity; the attention stands before norm3."""
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"norm{i}")) for i in (1, 2, 3)]
    stages = behind_first_norm(pairs)
    attention = attention_of(block.se)  # type: ignore[arg-type]
    branch: tuple[StepModules, ...] = ()
    end = stages
    if attention is not None:
        gated = BlockModules((stages[0], replace(stages[1], norm=None)), "none", gate=attention)
        branch, end = (gated, pairs[2][1]), stages[2:]
    if block.downsample is None:
        return CompositeModules(branch, BlockModules(end, "none"), before=(pairs[0][1],))
    pools, projection = shortcut_parts(block.downsample)  # type: ignore[arg-type]
    steps = skip_steps(pools, projection)
    gate = drop_path_of(block.drop_path)  # type: ignore[arg-type]
    return CompositeModules(branch, BlockModules(end, "none", gate=gate), steps, before=(pairs[0][1],))


BLOCKS: dict[str, Adapter] = {
    "timm.models.regnet.Bottleneck": bottleneck,
    "timm.models.regnet.PreBottleneck": pre_bottleneck,
}
