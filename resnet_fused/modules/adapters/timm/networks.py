"""timm's networks of layers in a row or side by side: DenseNet, DLA, HRNet, SelecSLS, VGG."""

from __future__ import annotations

from typing import Any

from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.adapters.torchvision.networks import dense_block
from resnet_fused.modules.block_modules import Adapter, BlockModules, Modules, StageModules


def dla_basic_block(block: Any) -> Modules:
    """arXiv:1707.06484. As it is called without a shortcut; `forwards` adds one that is given."""
    return with_skip(chain(block, ("relu", "relu")), None)


def dla_bottleneck(block: Any) -> Modules:
    return with_skip(chain(block, ("relu", "relu", "relu")), None)


def dla_root(root: Any) -> BlockModules:
    """What joins a tree's maps. `forwards` concatenates them and adds the first, where the root has a shortcut."""
    return BlockModules((StageModules(root.conv, root.bn, root.relu),), "none", in_place_add=True)


BLOCKS: dict[str, Adapter] = {
    "timm.models.densenet.DenseBlock": dense_block,
    "timm.models.dla.DlaBasic": dla_basic_block,
    "timm.models.dla.DlaBottleneck": dla_bottleneck,
    "timm.models.dla.DlaRoot": dla_root,
}
