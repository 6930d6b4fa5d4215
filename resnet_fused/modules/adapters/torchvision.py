"""torchvision's other networks, heads and layers. Its ResNets are in `resnet`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    DenseModules,
    StageModules,
    StepModules,
    class_path,
    require_no_hooks,
)


def regnet_block(block: nn.Module) -> BlockModules | CompositeModules:
    """arXiv:2003.13678: f = a, b, squeeze-excitation or none, c; the skip path is x or `proj`."""
    branch_modules = block.f
    require_no_hooks("f", branch_modules)  # type: ignore[arg-type]
    names = [name for name, _ in branch_modules.named_children()]  # type: ignore[union-attr]
    if names not in (["a", "b", "c"], ["a", "b", "se", "c"]):
        raise NotFusable(f"f has the parts {', '.join(names)}; accepted: a, b, se, c, without se or with it")
    first, second, last = (sequential.stage(f"f.{name}", getattr(branch_modules, name)) for name in "abc")
    last = replace(last, act=block.activation)  # type: ignore[arg-type]
    projection = None if block.proj is None else sequential.stage("proj", block.proj)  # type: ignore[arg-type]
    if "se" not in names:
        skip = "identity" if projection is None else "projection"
        return BlockModules((first, second, last), skip, projection)  # type: ignore[arg-type]
    se = branch_modules.se  # type: ignore[union-attr]
    _require_squeeze_excitation(se)  # type: ignore[arg-type]

    def gate(pooled: Tensor) -> Tensor:
        squeezed = se.activation(se.fc1(pooled[:, :, None, None]))  # type: ignore[union-attr, operator]
        return se.scale_activation(se.fc2(squeezed)).flatten(1)  # type: ignore[union-attr, operator]

    branch: tuple[StepModules, ...] = (BlockModules((first, second), "none", order="branch", gate=gate),)
    skip_path = () if projection is None else (BlockModules((projection,), "none"),)
    return CompositeModules(branch, BlockModules((last,), "none"), skip_path)


def _require_squeeze_excitation(se: nn.Module) -> None:
    if class_path(type(se)) != "torchvision.ops.misc.SqueezeExcitation":
        raise NotFusable(f"f.se is {type(se).__name__}; accepted: SqueezeExcitation itself")
    require_no_hooks("f.se", se)
    require_no_hooks("f.se.avgpool", se.avgpool)  # type: ignore[arg-type]


def basic_conv(module: nn.Module) -> BlockModules:
    """The Inceptions' layer."""
    return BlockModules((sequential.basic(module),), "none")


def aspp_pooling(container: nn.Module) -> CompositeModules:
    """Atrous pyramids' mean over all pixels and its layer; `forwards` enlarges what it gives."""
    return sequential.composite(sequential.chains(list(container.children())))


def shuffle_unit(unit: nn.Module) -> BlockModules:
    raise NotFusable("its branches are depthwise between 1x1 convolutions, where fusing has not been measured to gain")


def feature_pyramid(pyramid: Any) -> BlockModules:
    """Its layers are fused by themselves, where PyTorch does not run them faster."""
    for each in (*pyramid.inner_blocks, *pyramid.layer_blocks):
        sequential.layer(each)
    raise NotFusable("it adds maps of several sizes; its layers are fused by themselves")


def dense_block(block: nn.Module) -> CompositeModules:
    """arXiv:1608.06993: norm1, relu1, conv1, norm2, relu2, conv2 of everything before."""
    return CompositeModules((DenseModules(tuple(dense_layer(name, layer) for name, layer in block.named_children())),))


def dense_layer(name: str, layer: Any) -> tuple[StepModules, ...]:
    """Also timm's, whose norms have their activation."""
    require_no_hooks(name, layer)
    if getattr(layer, "memory_efficient", False) or getattr(layer, "grad_checkpointing", False):
        raise NotFusable(f"{name} is checkpointed; accepted: memory_efficient=False")
    pairs = [(getattr(layer, f"conv{i}"), getattr(layer, f"norm{i}"), getattr(layer, f"relu{i}", None)) for i in (1, 2)]
    block = BlockModules(tuple(StageModules(*pair) for pair in pairs), "none", order="pre")
    if layer.drop_rate == 0 or not layer.training:
        return (block,)
    return block, partial(F.dropout, p=layer.drop_rate)


BLOCKS: dict[str, Adapter] = {
    "torchvision.models.regnet.ResBottleneckBlock": regnet_block,
    "torchvision.models.regnet.SimpleStemIN": sequential.chain,
    "torchvision.models.densenet._DenseBlock": dense_block,
    "torchvision.models.googlenet.BasicConv2d": basic_conv,
    "torchvision.models.inception.BasicConv2d": basic_conv,
    "torchvision.models.shufflenetv2.InvertedResidual": shuffle_unit,
    "torchvision.models.segmentation.fcn.FCNHead": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.ASPPConv": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.DeepLabHead": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.ASPPPooling": aspp_pooling,
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": feature_pyramid,
    "torchvision.ops.misc.Conv2dNormActivation": sequential.layer,
}
LAYERS = ("torchvision.ops.misc.Conv2dNormActivation", *sequential.BASIC)
SEQUENTIALS: dict[str, tuple[str, ...]] = {
    "torchvision.models.densenet.DenseNet": ("features",),
    "torchvision.models.googlenet.Inception": ("branch2", "branch3", "branch4"),
    "torchvision.models.vgg.VGG": ("features",),
    "torchvision.models.segmentation.deeplabv3.ASPP": ("convs.0", "project"),
}
