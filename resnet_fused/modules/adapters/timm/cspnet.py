"""timm's cross stage partial networks, arXiv:1911.11929, and DarkNets."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.timm.attention import factor_or_module
from resnet_fused.modules.adapters.timm.layers import parts_of, with_shortcut
from resnet_fused.modules.block_modules import Adapter, Modules, SplitModules, StepModules


def bottleneck(block: Any) -> Modules:
    first, second, last = (parts_of(name, getattr(block, name)) for name in ("conv1", "conv2", "conv3"))
    parts = [*first, *second, factor_or_module(block.attn2, "attn2"), *last]
    return with_shortcut(parts, nn.Identity(), act=block.act3, attention=block.attn3, drop_path=block.drop_path)


def two_convolutions(block: Any) -> Modules:
    """DarkBlock and EdgeBlock, whose last activation stands before the addition."""
    first, last = (parts_of(name, getattr(block, name)) for name in ("conv1", "conv2"))
    parts = [*first, factor_or_module(block.attn, "attn"), *last]
    return with_shortcut(parts, nn.Identity(), drop_path=block.drop_path)


def cross_stage(stage: Any) -> Modules:
    """The second half of the channels goes through the blocks and a layer behind them, the first passes by."""
    return _crossed(stage, ((), (stage.blocks, *sequential.chains([stage.conv_transition_b]))))


def cross_stage3(stage: Any) -> Modules:
    """As `cross_stage`, of the first half and without the layer."""
    return _crossed(stage, ((stage.blocks,), ()))


def _crossed(stage: Any, halves: tuple[tuple[StepModules, ...], ...]) -> Modules:
    """The layers before the halves are one chain."""
    before = sequential.chains([part for part in (stage.conv_down, stage.conv_exp) if part is not None])
    return sequential.composite((*before, SplitModules(halves), *sequential.chains([stage.conv_transition])))


BLOCKS: dict[str, Adapter] = {
    "timm.models.cspnet.BottleneckBlock": bottleneck,
    "timm.models.cspnet.DarkBlock": two_convolutions,
    "timm.models.cspnet.EdgeBlock": two_convolutions,
    "timm.models.cspnet.CrossStage": cross_stage,
    "timm.models.cspnet.CrossStage3": cross_stage3,
}
SEQUENTIALS: dict[str, tuple[str, ...]] = {"timm.models.cspnet.CspNet": ("stem",)}
