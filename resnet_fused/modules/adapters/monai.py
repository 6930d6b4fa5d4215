"""MONAI's ResNet on pictures (``spatial_dims=2``)."""

from __future__ import annotations

from torch import nn

from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.block_modules import Adapter, BlockModules, CompositeModules, Modules


def basic_block(block: nn.Module) -> Modules:
    return _block(block, ("act", "act"))


def bottleneck(block: nn.Module) -> Modules:
    return _block(block, ("act", "act", "act"))


def _block(block: nn.Module, acts: tuple[str, ...]) -> Modules:
    """With ``shortcut_type="A"`` the skip path is a function, without a gradient."""
    stages, downsample = chain(block, acts), block.downsample
    if downsample is None or isinstance(downsample, nn.Module):
        return with_skip(stages, downsample)
    end = BlockModules(stages, "none", in_place_add=True)
    return CompositeModules((), end, (downsample,))  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "monai.networks.nets.resnet.ResNetBlock": basic_block,
    "monai.networks.nets.resnet.ResNetBottleneck": bottleneck,
}
