"""timm's configurable blocks: of CLIP's ResNets, ResNet-33ts, GENet, RepVGG, attention nets and others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.timm.attention import drop_path_of, factor_or_module
from resnet_fused.modules.adapters.timm.layers import Part, parts_of, stage_of, with_shortcut
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
)


def basic_block(block: Any) -> Modules:
    return _residual(block, [*_convs(block, "conv1_kxk"), _attention(block), *_convs(block, "conv2_kxk")])


def bottleneck(block: Any) -> Modules:
    middle = _convs(block, "conv1_1x1", "conv2_kxk", "conv2b_kxk")
    return _residual(block, [*middle, _attention(block), *_convs(block, "conv3_1x1")])


def dark_block(block: Any) -> Modules:
    """DarkNet's order: the pointwise convolution first."""
    return _residual(block, [*_convs(block, "conv1_1x1"), _attention(block), *_convs(block, "conv2_kxk")])


def edge_block(block: Any) -> Modules:
    """The pointwise convolution last, as EfficientNet's fused MBConv."""
    return _residual(block, [*_convs(block, "conv1_kxk"), _attention(block), *_convs(block, "conv2_1x1")])


def self_attention_block(block: Any) -> Modules:
    """A bottleneck around self-attention, which is called with the norm behind it."""
    called = [part for part in (block.self_attn, block.post_attn) if type(part) is not nn.Identity]
    return _residual(block, [*_convs(block, "conv1_1x1", "conv2_kxk"), *called, *_convs(block, "conv3_1x1")])


def rep_vgg_block(block: Any) -> Modules:
    """arXiv:2101.03697: act(norm(conv_kxk(x)) + norm(conv_1x1(x)) + norm(x)), the last where the shapes allow it."""
    if block.reparam_conv is not None:
        raise NotFusable("it is reparameterized: one convolution without a norm, which has nothing to fuse with")
    large, small = (stage_of(name, getattr(block, name)) for name in ("conv_kxk", "conv_1x1"))
    return _added_branches(block, [large, small])


def mobile_one_block(block: Any) -> Modules:
    """arXiv:2206.04040: as RepVGG's, with several convolutions beside each other."""
    if block.reparam_conv is not None:
        raise NotFusable("it is reparameterized: one convolution without a norm, which has nothing to fuse with")
    branches = [stage_of(f"conv_kxk.{i}", each) for i, each in enumerate(block.conv_kxk)]
    if block.conv_scale is not None:
        branches.append(stage_of("conv_scale", block.conv_scale))
    return _added_branches(block, branches)


def _residual(block: Any, parts: list[Part | None]) -> Modules:
    """The block's own activation follows the addition."""
    attention: nn.Module | None = getattr(block, "attn_last", None)
    return with_shortcut(parts, block.shortcut, act=block.act, attention=attention, drop_path=block.drop_path)


def _convs(block: Any, *names: str) -> list[Part]:
    used = [name for name in names if type(getattr(block, name)) is not nn.Identity]
    return [part for name in used for part in parts_of(name, getattr(block, name))]


def _attention(block: Any) -> Part | None:
    return factor_or_module(block.attn, "attn")


def _added_branches(block: Any, branches: list[StageModules]) -> Modules:
    """Convolutions of x with a norm each, and the norm of x itself, added, before attention and activation."""
    if any(_is_depthwise(branch.conv) for branch in branches):
        raise NotFusable(
            "its convolutions are depthwise, and each with its norm is faster in PyTorch; accepted: others"
        )
    attended = type(block.attn) is not nn.Identity
    act = None if attended else block.act
    after: tuple[nn.Module, ...] = (block.attn, block.act) if attended else ()
    if len(branches) == 1 and block.identity is None and not attended:
        sequential.require_gain(StageModules(branches[0].conv, None, act))  # its norm has no activation
    if block.identity is None or drop_path_of(block.drop_path) is None:
        return _sum(branches, () if block.identity is None else (block.identity,), act, after)
    dropped = (_sum(branches, (), None, ()), block.drop_path)
    return CompositeModules(dropped, None, (block.identity,), after=after or (block.act,), in_place_add=True)


def _sum(
    branches: list[StageModules], rest: tuple[StepModules, ...], act: nn.Module | None, after: tuple[nn.Module, ...]
) -> Modules:
    """act(the first branch + (the second + (… + rest))), in the branches' dtype: x's own norm may have another."""
    first = replace(branches[0], act=act)
    end = BlockModules((first,), "none", in_place_add=True)
    if len(branches) == 1:
        return CompositeModules((), end, rest or None, after=after) if rest or after else end
    if len(branches) == 2 and not rest and not after:
        return BlockModules((first,), "projection", branches[1], in_place_add=True)
    return CompositeModules((), end, (_sum(branches[1:], rest, None, ()),), after=after)


def _is_depthwise(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels


BLOCKS: dict[str, Adapter] = {
    "timm.models.byobnet.BasicBlock": basic_block,
    "timm.models.byobnet.BottleneckBlock": bottleneck,
    "timm.models.byobnet.DarkBlock": dark_block,
    "timm.models.byobnet.EdgeBlock": edge_block,
    "timm.models.byobnet.SelfAttnBlock": self_attention_block,
    "timm.models.byobnet.RepVggBlock": rep_vgg_block,
    "timm.models.byobnet.MobileOneBlock": mobile_one_block,
    "timm.models.byobnet.Stem": sequential.chain,
}
