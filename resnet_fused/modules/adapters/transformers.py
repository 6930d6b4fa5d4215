"""Hugging Face transformers' residual layers: ResNet, RegNet, RT-DETR's ResNet, UVDoc, the detectors' RepVGG blocks.

Its models repeat each other's classes under names of their own, so what a class holds is written once and the copies
are listed. A stem (ResNetEmbeddings) has no adapter: its own forward runs, and `modules.stem` fuses what it calls.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import skip_steps
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    class_path,
    original_path,
    require_no_hooks,
)

MODELS = "transformers.models."
RESNET, REGNET = MODELS + "resnet.modeling_resnet.", MODELS + "regnet.modeling_regnet."
RT_DETR_RESNET, UVDOC = MODELS + "rt_detr.modeling_rt_detr_resnet.", MODELS + "uvdoc.modeling_uvdoc."
SQUEEZE_EXCITATION = REGNET + "RegNetSELayer"
SILU, GELU = "transformers.activations.SiLUActivation", "transformers.activations.GELUActivation"

DETECTORS = {  # the prefix of its classes
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "d_fine": "DFine",
    "deimv2": "Deimv2",
    "omdet_turbo": "OmDetTurbo",
    "pp_doclayout_v2": "PPDocLayoutV2",
    "pp_doclayout_v3": "PPDocLayoutV3",
    "pp_doclayout_v4": "PPDocLayoutV4",
}


def _of_detectors(name: str) -> tuple[str, ...]:
    return tuple(f"{MODELS}{model}.modeling_{model}.{prefix}{name}" for model, prefix in DETECTORS.items())


# a convolution, its norm and its activation, by these names
LONG, SHORT = ("convolution", "normalization", "activation"), ("conv", "norm", "activation")
PARTS: dict[str, tuple[str, str, str]] = {
    RESNET + "ResNetConvLayer": LONG,
    REGNET + "RegNetConvLayer": LONG,
    RT_DETR_RESNET + "RTDetrResNetConvLayer": LONG,
    UVDOC + "UVDocConvLayer": LONG,
    **dict.fromkeys(_of_detectors("ConvNormLayer"), SHORT),
}
SHORTCUTS = (RESNET + "ResNetShortCut", REGNET + "RegNetShortCut", RT_DETR_RESNET + "RTDetrResNetShortCut")


def residual_layer(block: nn.Module) -> Modules:
    """`layer` holds convolutions, among them perhaps a squeeze-excitation; `shortcut` may pool first."""
    layer = block.layer
    require_no_hooks("layer", layer)  # type: ignore[arg-type]
    if type(layer) is not nn.Sequential:
        raise NotFusable(f"layer is {type(layer).__name__}; accepted: nn.Sequential")
    parts = list(layer.children())
    gates = [i for i, part in enumerate(parts) if original_path(part) == SQUEEZE_EXCITATION]
    stages = [_stage(f"layer.{i}", part) for i, part in enumerate(parts) if i not in gates]
    stages[-1] = _with_activation(stages[-1], block.activation)  # type: ignore[arg-type]
    pools, projection = _shortcut(block.shortcut)  # type: ignore[arg-type]
    if not gates and not pools:
        skip = "identity" if projection is None else "projection"
        return BlockModules(tuple(stages), skip, projection, in_place_add=True)  # type: ignore[arg-type]
    at = gates[0] if gates else 0
    if len(gates) > 1 or at == len(parts) - 1:
        names = ", ".join(type(part).__name__ for part in parts)
        raise NotFusable(f"layer is {names}; accepted: convolutions, with one squeeze-excitation before the last")
    branch = (_gated(tuple(stages[:at]), parts[at]),) if gates else ()
    end = BlockModules(tuple(stages[at:]), "none", in_place_add=True)
    return CompositeModules(branch, end, skip_steps(pools, projection))


def uvdoc_layer(block: nn.Module) -> BlockModules:
    """The shortcut's convolution is as large as the branch's."""
    first = _stage("conv_start", block.conv_start)  # type: ignore[arg-type]
    last = _with_activation(_stage("conv_final", block.conv_final), block.act_fn)  # type: ignore[arg-type]
    if type(block.conv_down) is nn.Identity:
        require_no_hooks("conv_down", block.conv_down)
        return BlockModules((first, last), "identity")
    return BlockModules((first, last), "projection", _stage("conv_down", block.conv_down))  # type: ignore[arg-type]


def rep_vgg_block(block: nn.Module) -> BlockModules:
    """arXiv:2101.03697 without the identity: a 3x3 convolution beside a pointwise one."""
    stage = _with_activation(_stage("conv1", block.conv1), block.activation)  # type: ignore[arg-type]
    return BlockModules((stage,), "projection", _stage("conv2", block.conv2))  # type: ignore[arg-type]


def conv_layer(module: nn.Module) -> BlockModules:
    """A convolution, norm and activation on their own."""
    found = _parts(module)
    sequential.require_gain(found)
    return BlockModules((found,), "none")


def _stage(name: str, module: nn.Module) -> StageModules:
    """Of a layer within a block."""
    if original_path(module) not in PARTS:
        accepted = ", ".join(path.rpartition(".")[2] for path in PARTS)
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: {accepted}")
    require_no_hooks(name, module)
    return _parts(module)


def _parts(module: nn.Module) -> StageModules:
    conv, norm, act = (getattr(module, name) for name in PARTS[original_path(module)])
    return StageModules(conv, norm, _activation(act))


def _with_activation(stage: StageModules, act: nn.Module) -> StageModules:
    """The branch's last stage has none of its own; the block's stands behind the addition."""
    if type(stage.act) is not nn.Identity:
        raise NotFusable(f"the branch ends in {type(stage.act).__name__}; accepted: nothing between norm and addition")
    require_no_hooks("the last convolution's activation", stage.act)
    return replace(stage, act=_activation(act))


def _activation(act: nn.Module) -> nn.Module | str:
    """transformers has modules of its own around two of PyTorch's functions."""
    path = class_path(type(act))
    if path not in (SILU, GELU):
        return act
    require_no_hooks("the activation", act)
    if path == SILU:
        return "silu"
    return "gelu" if act.act is F.gelu else act


def _shortcut(shortcut: nn.Module) -> tuple[tuple[nn.Module, ...], StageModules | None]:
    """(what pools, the projection or None for the identity)."""
    require_no_hooks("shortcut", shortcut)
    parts = list(shortcut.children()) if type(shortcut) is nn.Sequential else [shortcut]
    *pools, last = parts
    if type(last) is nn.Identity:
        require_no_hooks("the shortcut's end", last)
        return tuple(pools), None
    if original_path(last) not in SHORTCUTS:
        raise NotFusable(
            f"shortcut ends in {type(last).__name__}; accepted: a convolution with its norm, or nn.Identity"
        )
    require_no_hooks("the shortcut's end", last)
    return tuple(pools), StageModules(last.convolution, last.normalization, None)  # type: ignore[arg-type]


def _gated(stages: tuple[StageModules, ...], se: nn.Module) -> BlockModules:
    require_no_hooks("squeeze-excitation", se)
    require_no_hooks("squeeze-excitation's pooler", se.pooler)  # type: ignore[arg-type]

    def gate(pooled: Tensor) -> Tensor:
        return se.attention(pooled[:, :, None, None]).flatten(1)  # type: ignore[operator]

    return BlockModules(stages, "none", order="branch", gate=gate)


BLOCKS: dict[str, Adapter] = {
    RESNET + "ResNetBasicLayer": residual_layer,
    RESNET + "ResNetBottleNeckLayer": residual_layer,
    REGNET + "RegNetXLayer": residual_layer,
    REGNET + "RegNetYLayer": residual_layer,
    RT_DETR_RESNET + "RTDetrResNetBasicLayer": residual_layer,
    RT_DETR_RESNET + "RTDetrResNetBottleNeckLayer": residual_layer,
    UVDOC + "UVDocResidualBlock": uvdoc_layer,
    **dict.fromkeys(_of_detectors("RepVggBlock"), rep_vgg_block),
    **dict.fromkeys(PARTS, conv_layer),
}
LAYERS: tuple[str, ...] = tuple(PARTS)
