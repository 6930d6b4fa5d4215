"""timm's networks of layers in a row or side by side: DenseNet, DLA, HRNet, SelecSLS, VGG."""

from __future__ import annotations

from typing import Any

from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.adapters.torchvision import dense_block
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
SEQUENTIALS: dict[str, tuple[str, ...]] = {
    "timm.models.densenet.DenseNet": ("features",),
    "timm.models.dla.DLA": ("base_layer", "level0", "level1"),
    "timm.models.hrnet.HighResolutionModule": ("fuse_layers.*.*",),
    "timm.models.hrnet.HighResolutionNet": (
        *(f"transition{i}.*" for i in (1, 2, 3)),
        "downsamp_modules.*",
        "final_layer",
    ),
    "timm.models.selecsls.SelecSls": ("stem", "head"),
    "timm.models.selecsls.SelecSlsBlock": tuple(f"conv{i}" for i in range(1, 7)),
    "timm.models.vgg.VGG": ("features",),
}
