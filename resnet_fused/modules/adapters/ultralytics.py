"""Ultralytics' YOLO and RT-DETR: its Conv is a convolution, batch norm and activation."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import shortcut_or_none
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    original_path,
    require_no_hooks,
)

CONV = "ultralytics.nn.modules.conv.Conv"
REP_CONV = "ultralytics.nn.modules.conv.RepConv"


def bottleneck(block: nn.Module) -> Modules:
    """YOLO's: the activation stands before the addition. Of C2f, C3 and others, which call it."""
    if original_path(block.cv1) == REP_CONV:  # type: ignore[arg-type]
        end = BlockModules((_stage("cv2", block.cv2),), "none", order="branch")  # type: ignore[arg-type]
        return CompositeModules((block.cv1,), end, () if block.add else None)  # type: ignore[arg-type]
    stages = tuple(_stage(f"cv{i}", getattr(block, f"cv{i}")) for i in (1, 2))
    return BlockModules(stages, "identity" if block.add else "none", order="branch")


def resnet_block(block: nn.Module) -> BlockModules:
    """Its inner activations are Conv's, its last one is ReLU."""
    first, second, last = (_stage(f"cv{i}", getattr(block, f"cv{i}")) for i in (1, 2, 3))
    stages = (first, second, _with_act("cv3", last, F.relu))
    shortcut = shortcut_or_none(block.shortcut)  # type: ignore[arg-type]
    if shortcut is None:
        return BlockModules(stages, "identity")
    if type(shortcut) is not nn.Sequential or len(shortcut) != 1:
        raise NotFusable(f"shortcut is {type(shortcut).__name__}; accepted: nn.Sequential of one Conv, nn.Identity")
    return BlockModules(stages, "projection", _projection("shortcut.0", shortcut[0]))


def rep_conv(block: nn.Module) -> Modules:
    """arXiv:2101.03697, of three branches: 3x3, 1x1 and, with ``bn=True``, a batch norm alone."""
    _require_unfused("it", block)
    first = _with_act("conv1", _stage("conv1", block.conv1), block.act)  # type: ignore[arg-type]
    pointwise = _projection("conv2", block.conv2)  # type: ignore[arg-type]
    if block.bn is None:
        return BlockModules((first,), "projection", pointwise)
    skip = CompositeModules((), BlockModules((pointwise,), "none"), (block.bn,))  # type: ignore[arg-type]
    return CompositeModules((), BlockModules((first,), "none"), (skip,))


def layer(module: nn.Module) -> BlockModules:
    stage = _stage("it", module)
    sequential.require_gain(stage)
    return BlockModules((stage,), "none")


def _stage(name: str, module: nn.Module) -> StageModules:
    if original_path(module) != CONV:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: Conv")
    _require_unfused(name, module)
    return StageModules(module.conv, module.bn, module.act)  # type: ignore[arg-type]


def _require_unfused(name: str, module: nn.Module) -> None:
    """Ultralytics' own fuse() folds the batch norms into the convolutions, deletes them and replaces forward."""
    if getattr(module.__dict__.get("forward"), "__name__", None) == "forward_fuse":
        raise NotFusable(
            f"{name} has no batch norm: Ultralytics' own fuse() has folded it into the convolution; accepted: a model "
            "before that call"
        )
    require_no_hooks(name, module)


def _projection(name: str, module: nn.Module) -> StageModules:
    return _with_act(name, _stage(name, module), None)


def _with_act(name: str, stage: StageModules, act: object) -> StageModules:
    """Of a Conv whose own activation is none."""
    if type(stage.act) is not nn.Identity:
        raise NotFusable(f"{name} has the activation {type(stage.act).__name__}; accepted before an addition: none")
    require_no_hooks(f"{name}.act", stage.act)
    return replace(stage, act=act)  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "ultralytics.nn.modules.block.Bottleneck": bottleneck,
    "ultralytics.nn.modules.block.RepBottleneck": bottleneck,
    "ultralytics.nn.modules.block.ResNetBlock": resnet_block,
    REP_CONV: rep_conv,
    CONV: layer,
}
LAYERS: tuple[str, ...] = (CONV, REP_CONV)
