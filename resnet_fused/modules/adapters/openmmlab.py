"""OpenMMLab's blocks: the ResNets of mmdet, mmseg, mmpretrain and mmpose, the Darknets of its detectors."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    Modules,
    StageModules,
    class_path,
    original_path,
    require_no_hooks,
)
from resnet_fused.spec import Skip

LIBRARIES = ("mmdet", "mmseg", "mmpretrain", "mmcls", "mmpose")
CONV_MODULE = "mmcv.cnn.bricks.conv_module.ConvModule"
DROP_PATH = "mmcv.cnn.bricks.drop.DropPath"
SWISH = "mmcv.cnn.bricks.swish.Swish"
SE_LAYERS = tuple(
    f"{package}.utils.se_layer.SELayer" for package in ("mmpretrain.models", "mmcls.models", "mmpose.models.backbones")
)


def basic_block(block: nn.Module) -> Modules:
    return _block(block, 2, _drop_path(block))


def bottleneck(block: nn.Module) -> Modules:
    """Its stride stands in the 1x1 convolution (style "caffe") or in the 3x3."""
    return _block(block, 3, _drop_path(block))


def se_bottleneck(block: nn.Module) -> Modules:
    """It has a `drop_path` and does not call it."""
    return _block(block, 3, _squeeze_excitation(block.se_layer))  # type: ignore[arg-type]


def darknet_block(block: nn.Module) -> BlockModules:
    """YOLO's: the activation stands before the addition."""
    stages = tuple(_conv_module(f"conv{i}", getattr(block, f"conv{i}")) for i in (1, 2))
    skip: Skip = "identity" if getattr(block, "add_identity", True) else "none"
    return BlockModules(stages, skip, order="branch", gate=_drop_path(block))


def layer(module: nn.Module) -> BlockModules:
    raise NotFusable(
        "a layer that is called with arguments beside its input (norm=False, activate=False); accepted: as a part of a "
        "known block"
    )


def _block(block: nn.Module, convs: int, gate: Callable[[Tensor], Tensor] | None) -> Modules:
    if block.with_cp and block.training:
        raise NotFusable(
            "with_cp is set: the block's own forward computes it again in backward; accepted in training: False "
            '(fuse(memory="low") recomputes a part of it)'
        )
    if getattr(block, "with_plugins", False):
        raise NotFusable("with_plugins is set; accepted: a block without plugins between its convolutions")
    return with_skip(chain(block, ("relu",) * convs, norm="norm"), block.downsample, gate=gate)  # type: ignore[arg-type]


def _drop_path(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Stochastic depth, by the module itself and so with its random numbers."""
    module = getattr(block, "drop_path", None)
    if module is None or type(module) is nn.Identity:
        return None
    if class_path(type(module)) != DROP_PATH:
        raise NotFusable(f"drop_path is {type(module).__name__}; accepted: mmcv's DropPath, nn.Identity")
    require_no_hooks("drop_path", module)
    if not module.training or module.drop_prob == 0:
        return None
    return lambda pooled: module(pooled.new_ones(len(pooled), 1))


def _squeeze_excitation(se: nn.Module) -> Callable[[Tensor], Tensor]:
    if class_path(type(se)) not in SE_LAYERS or getattr(se, "return_weight", False):
        raise NotFusable(f"se_layer is {type(se).__name__}; accepted: SELayer, which multiplies")
    require_no_hooks("se_layer", se)
    require_no_hooks("se_layer.global_avgpool", se.global_avgpool)  # type: ignore[arg-type]
    return lambda pooled: se.conv2(se.conv1(pooled[:, :, None, None])).flatten(1)  # type: ignore[operator]


def _conv_module(name: str, module: nn.Module) -> StageModules:
    """Of mmcv's layer within a block."""
    if original_path(module) != CONV_MODULE:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: ConvModule")
    require_no_hooks(name, module)
    if module.order != ("conv", "norm", "act") or module.with_explicit_padding:
        raise NotFusable(f"{name} has order={module.order}; accepted: conv, norm, act, with the convolution's padding")
    act = module.activate if module.with_activation else None
    if act is not None and class_path(type(act)) == SWISH:
        require_no_hooks(f"{name}.activate", act)  # type: ignore[arg-type]
        act = F.silu  # type: ignore[assignment]
    return StageModules(module.conv, module.norm if module.with_norm else None, act)  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    **{
        f"{library}.models.backbones.{name}": adapter
        for library in LIBRARIES
        for name, adapter in {
            "resnet.BasicBlock": basic_block,
            "resnet.Bottleneck": bottleneck,
            "resnext.Bottleneck": bottleneck,  # whose convolutions have groups
            "seresnet.SEBottleneck": se_bottleneck,
            "seresnext.SEBottleneck": se_bottleneck,
        }.items()
    },
    "mmdet.models.backbones.darknet.ResBlock": darknet_block,
    "mmdet.models.layers.csp_layer.DarknetBottleneck": darknet_block,
    "mmpretrain.models.backbones.cspnet.DarknetBottleneck": darknet_block,
    CONV_MODULE: layer,
}
LAYERS: tuple[str, ...] = (CONV_MODULE,)
