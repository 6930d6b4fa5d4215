"""timm's inverted residuals: the blocks of its MobileNets, EfficientNets and their relatives."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.inverted_residual import inverted_residual
from resnet_fused.modules.adapters.timm.attention import attention_of, drop_path_of
from resnet_fused.modules.adapters.timm.layers import stage_of
from resnet_fused.modules.block_modules import Adapter, Modules, StageModules, class_path, require_no_hooks
from resnet_fused.params import Scale


def conv_bn_act(block: nn.Module) -> Modules:
    stages = _stages(block, "conv", "bn1")
    if not block.has_skip:
        sequential.require_gain(stages[0])
    return _block(block, (), stages)


def depthwise_separable(block: nn.Module) -> Modules:
    return _block(block, (*_space_to_depth(block), *_stages(block, "conv_dw", "bn1")), _stages(block, "conv_pw", "bn2"))


def inverted(block: nn.Module) -> Modules:
    before = (*_space_to_depth(block), *_stages(block, "conv_pw", "bn1", "conv_dw", "bn2"))
    return _block(block, before, _stages(block, "conv_pwl", "bn3"))


def edge(block: nn.Module) -> Modules:
    return _block(block, _stages(block, "conv_exp", "bn1"), _stages(block, "conv_pwl", "bn2"))


def universal(block: nn.Module) -> Modules:
    """MobileNetV4's: depthwise convolutions before, within and behind, each of them optional."""
    before, last = (
        tuple(stage_of(name, getattr(block, name)) for name in names if type(getattr(block, name)) is not nn.Identity)
        for names in (("dw_start", "pw_exp", "dw_mid"), ("pw_proj", "dw_end"))
    )
    return inverted_residual(
        before,
        last,
        adds=block.has_skip,  # type: ignore[arg-type]
        attention=attention_of(block.se),  # type: ignore[arg-type]
        gate=drop_path_of(block.drop_path) if block.has_skip else None,  # type: ignore[arg-type]
        branch_scale=_layer_scale(block.layer_scale),  # type: ignore[arg-type]
    )


def _block(block: Any, before: tuple[StageModules, ...], last: tuple[StageModules, ...]) -> Modules:
    """What blurs stands between the stages, before the attention; both are then called as they are."""
    se = getattr(block, "se", None)
    between: tuple[nn.Module, ...] = ()
    if type(block.aa) is nn.Identity:
        require_no_hooks("aa", block.aa)
    elif not before:
        raise NotFusable(f"aa is {type(block.aa).__name__} behind the last convolution; accepted there: nn.Identity")
    else:
        between = (block.aa, *((se,) if se is not None else ()))
    return inverted_residual(
        before,
        last,
        adds=block.has_skip,
        attention=None if between else attention_of(se),
        between=between,
        gate=drop_path_of(block.drop_path) if block.has_skip else None,
    )


def _space_to_depth(block: nn.Module) -> tuple[StageModules, ...]:
    return () if block.conv_s2d is None else _stages(block, "conv_s2d", "bn_s2d")


def _stages(block: nn.Module, *names: str) -> tuple[StageModules, ...]:
    """Of pairs of a convolution's and its norm's name; the norms hold the activations."""
    pairs = zip(names[::2], names[1::2], strict=True)
    return tuple(StageModules(getattr(block, conv), getattr(block, norm), None) for conv, norm in pairs)


def _layer_scale(module: nn.Module) -> Scale:
    require_no_hooks("layer_scale", module)
    if type(module) is nn.Identity:
        return 1.0
    if class_path(type(module)) != "timm.layers.layer_scale.LayerScale2d":
        raise NotFusable(f"layer_scale is {type(module).__name__}; accepted: LayerScale2d, nn.Identity")
    return module.gamma  # type: ignore[return-value]


BLOCKS: dict[str, Adapter] = {
    "timm.models._efficientnet_blocks.ConvBnAct": conv_bn_act,
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": depthwise_separable,
    "timm.models._efficientnet_blocks.InvertedResidual": inverted,
    "timm.models._efficientnet_blocks.EdgeResidual": edge,
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": universal,
}
