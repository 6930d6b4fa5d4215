"""Adapters: for a block class, which children play which part.

Classes of optional dependencies stand here by name, so nothing is imported to recognise them. Only the exact class
matches: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resnet_fused.modules.adapters import resnet, sequential, timm, torchvision
from resnet_fused.modules.block_modules import BlockModules, CompositeModules, class_path

Adapter = Callable[[nn.Module], BlockModules | CompositeModules]

BUILT_IN: dict[str, Adapter] = {
    "resnet_fused.models.resnet.BasicBlock": resnet.own_basic_block,
    "resnet_fused.models.resnet.Bottleneck": resnet.own_bottleneck,
    "resnet_fused.models.resnet.PreBasicBlock": resnet.pre_basic_block,
    "resnet_fused.models.resnet.PreBottleneck": resnet.pre_bottleneck,
    "resnet_fused.models.resnet.ResNet": resnet.stem,
    "torchvision.models.resnet.BasicBlock": resnet.basic_block,
    "torchvision.models.resnet.Bottleneck": resnet.bottleneck,
    "torchvision.models.resnet.ResNet": resnet.stem,
    "torchvision.models.regnet.ResBottleneckBlock": torchvision.regnet_block,
    "torchvision.models.regnet.SimpleStemIN": sequential.chain,
    "torchvision.models._utils.IntermediateLayerGetter": resnet.stem,
    "torchvision.models.segmentation.fcn.FCNHead": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.ASPPConv": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.DeepLabHead": sequential.chain,
    "torchvision.ops.misc.Conv2dNormActivation": sequential.layer,
    "timm.models.resnet.BasicBlock": timm.basic_block,
    "timm.models.resnet.Bottleneck": timm.bottleneck,
    "timm.models.resnet.ResNet": timm.stem,
    "timm.models.resnetv2.PreActBasic": timm.pre_basic_block,
    "timm.models.resnetv2.PreActBottleneck": timm.pre_bottleneck,
    "timm.models.regnet.Bottleneck": timm.regnet_bottleneck,
    "timm.models.regnet.PreBottleneck": timm.regnet_pre_bottleneck,
    "timm.models.senet.SEBottleneck": timm.legacy_bottleneck,
    "timm.models.senet.SEResNetBottleneck": timm.legacy_bottleneck,
    "timm.models.senet.SEResNeXtBottleneck": timm.legacy_bottleneck,
    "timm.models.senet.SEResNetBlock": timm.legacy_basic_block,
    "timm.models.byobnet.BottleneckBlock": timm.byob_bottleneck,
    "timm.models.sknet.SelectiveKernelBottleneck": timm.selective_kernel_bottleneck,
    "timm.models.sknet.SelectiveKernelBasic": timm.selective_kernel_basic_block,
    timm.CONV_NORM_ACT: timm.conv_norm_act,
}
# known classes that are pieces of blocks
LAYERS = (timm.CONV_NORM_ACT, "torchvision.ops.misc.Conv2dNormActivation")
# plain nn.Sequentials that a model calls, by their names in it: chains by what they hold
SEQUENTIALS: dict[str, tuple[str, ...]] = {
    "timm.models.senet.SENet": ("layer0",),
    "timm.models.resnetv2.ResNetV2": ("stem",),
    "torchvision.models.segmentation.deeplabv3.ASPP": ("convs.0", "project"),
}
_registered: dict[type[nn.Module], Adapter] = {}


def find(cls: type[nn.Module]) -> Adapter | None:
    """The adapter of exactly this class; one registered by the user comes before a built-in one."""
    return _registered.get(cls) or BUILT_IN.get(class_path(cls))


def is_built_in(cls: type[nn.Module]) -> bool:
    """Whether `find` gives one of ours, which reads nothing but the module's and its children's attributes."""
    return cls not in _registered


def register_block(cls: type[nn.Module], adapter: Adapter) -> None:
    """Teach `fuse` a block class, for this process.

    cls:     its ``forward(x)`` computes one of the formulas of `resnet_fused.spec`; subclasses need their own entry.
    adapter: ``adapter(module)`` names the children, as `BlockModules` or `CompositeModules`; it raises `NotFusable`
             with a reason for a variant that is not that formula. Called at every forward, so it should only read
             attributes.

    Raises TypeError if cls is not a module class or the adapter cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module, got {cls!r}")
    if not callable(adapter):
        raise TypeError(f"adapter must be callable, as adapter(module) -> BlockModules, got {adapter!r}")
    _registered[cls] = adapter
