"""torchvision's inverted residuals: MobileNets, MNASNets and EfficientNets."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.inverted_residual import inverted_residual
from resnet_fused.modules.adapters.torchvision.gates import SQUEEZE_EXCITATION, squeeze_excitation, stochastic_depth
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    Modules,
    StageModules,
    class_path,
    require_no_hooks,
)


def mobilenet_v2(block: nn.Module) -> Modules:
    return _block(block, "conv", adds=block.use_res_connect)


def mobilenet_v3(block: nn.Module) -> Modules:
    return _block(block, "block", adds=block.use_res_connect, in_place_add=True)


def mb_conv(block: nn.Module) -> Modules:
    """Of both EfficientNets; FusedMBConv's expansion is a convolution of several taps."""
    gate = stochastic_depth("stochastic_depth", block.stochastic_depth) if block.use_res_connect else None
    return _block(block, "block", adds=block.use_res_connect, in_place_add=True, gate=gate)


def mnasnet(block: nn.Module) -> Modules:
    return _block(block, "layers", adds=block.apply_residual)


def _block(block: nn.Module, name: str, **settings: Any) -> Modules:
    """Of a branch that is an nn.Sequential, with squeeze-excitation before its last stage or without."""
    container = getattr(block, name)
    require_no_hooks(name, container)
    if type(container) is not nn.Sequential:
        raise NotFusable(f"{name} is {type(container).__name__}; accepted: nn.Sequential")
    parts = list(container.named_children())
    at = next((i for i, (_, part) in enumerate(parts) if class_path(type(part)) == SQUEEZE_EXCITATION), None)
    if at is None:
        return inverted_residual((), _stages(name, parts), **settings)
    attention = squeeze_excitation(f"{name}.{parts[at][0]}", parts[at][1])
    before, last = _stages(name, parts[:at]), _stages(name, parts[at + 1 :])
    return inverted_residual(before, last, attention=attention, **settings)


def _stages(name: str, parts: list[tuple[str, nn.Module]]) -> tuple[StageModules, ...]:
    modules = [part for _, part in parts]
    for child, part in parts:
        require_no_hooks(f"{name}.{child}", part)
    steps = sequential.chains(modules, within_block=True)
    if len(steps) != 1 or not isinstance(steps[0], BlockModules):
        names = ", ".join(type(part).__name__ for part in modules)
        raise NotFusable(f"{name} holds {names}; accepted: convolutions, each with a norm, and activations")
    return steps[0].stages


BLOCKS: dict[str, Adapter] = {
    "torchvision.models.mobilenetv2.InvertedResidual": mobilenet_v2,
    "torchvision.models.mobilenetv3.InvertedResidual": mobilenet_v3,
    "torchvision.models.efficientnet.MBConv": mb_conv,
    "torchvision.models.efficientnet.FusedMBConv": mb_conv,
    "torchvision.models.mnasnet._InvertedResidual": mnasnet,
}
