"""torchvision's other networks, and the heads of its segmentation and detection."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    DenseModules,
    StageModules,
    StepModules,
    require_no_hooks,
)


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
    "torchvision.models.densenet._DenseBlock": dense_block,
    "torchvision.models.googlenet.BasicConv2d": basic_conv,
    "torchvision.models.inception.BasicConv2d": basic_conv,
    "torchvision.models.shufflenetv2.InvertedResidual": shuffle_unit,
    "torchvision.models.segmentation.fcn.FCNHead": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.ASPPConv": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.DeepLabHead": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.ASPPPooling": aspp_pooling,
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": feature_pyramid,
}
LAYERS = sequential.BASIC
