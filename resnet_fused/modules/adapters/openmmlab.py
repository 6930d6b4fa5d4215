"""The ResNets of OpenMMLab's libraries: mmdet, mmseg, mmpretrain and mmpose."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.block_modules import Adapter, Modules, class_path, require_no_hooks

LIBRARIES = ("mmdet", "mmseg", "mmpretrain", "mmcls", "mmpose")
DROP_PATH = "mmcv.cnn.bricks.drop.DropPath"


def basic_block(block: nn.Module) -> Modules:
    return _block(block, ("relu", "relu"))


def bottleneck(block: nn.Module) -> Modules:
    """Its stride stands in the 1x1 convolution (style "caffe") or in the 3x3."""
    return _block(block, ("relu", "relu", "relu"))


def _block(block: nn.Module, acts: tuple[str, ...]) -> Modules:
    if block.with_cp and block.training:
        raise NotFusable(
            "with_cp is set: the block's own forward computes it again in backward; accepted in training: False "
            '(fuse(memory="low") recomputes a part of it)'
        )
    if getattr(block, "with_plugins", False):
        raise NotFusable("with_plugins is set; accepted: a block without plugins between its convolutions")
    gate = _drop_path(getattr(block, "drop_path", None))
    return with_skip(chain(block, acts, norm="norm"), block.downsample, gate=gate)  # type: ignore[arg-type]


def _drop_path(module: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """Stochastic depth of mmpretrain, by the module itself and so with its random numbers."""
    if module is None or type(module) is nn.Identity:
        return None
    if class_path(type(module)) != DROP_PATH:
        raise NotFusable(f"drop_path is {type(module).__name__}; accepted: mmcv's DropPath, nn.Identity")
    require_no_hooks("drop_path", module)
    if not module.training or module.drop_prob == 0:
        return None
    return lambda pooled: module(pooled.new_ones(len(pooled), 1))


BLOCKS: dict[str, Adapter] = {
    f"{library}.models.backbones.{name}": adapter
    for library in LIBRARIES
    for name, adapter in {
        "resnet.BasicBlock": basic_block,
        "resnet.Bottleneck": bottleneck,
        "resnext.Bottleneck": bottleneck,  # whose convolutions have groups
    }.items()
}
# a plain nn.Sequential where the model has a deep stem (ResNet v1c, v1d)
SEQUENTIALS: dict[str, tuple[str, ...]] = {
    f"{library}.models.backbones.resnet.{name}": ("stem",)
    for library in ("mmdet", "mmseg")
    for name in ("ResNet", "ResNetV1c", "ResNetV1d")
}
