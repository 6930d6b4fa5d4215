"""Adapters: for a block class, which children play which part.

Classes of optional dependencies stand here by name, so nothing is imported to recognise them. Only the exact class
matches: a subclass may compute something else. Each library's file ends with its classes.
"""

from __future__ import annotations

from torch import nn

from resnet_fused.modules.adapters import (
    clip,
    detectron2,
    insightface,
    kornia,
    monai,
    openmmlab,
    pl_bolts,
    pytorchcv,
    resnet,
    timm,
    torchvision,
    ultralytics,
    wespeaker,
)
from resnet_fused.modules.block_modules import Adapter, class_path

BUILT_IN: dict[str, Adapter] = {
    **resnet.BLOCKS,
    **torchvision.BLOCKS,
    **timm.BLOCKS,
    **clip.BLOCKS,
    **detectron2.BLOCKS,
    **insightface.BLOCKS,
    **kornia.BLOCKS,
    **monai.BLOCKS,
    **openmmlab.BLOCKS,
    **pl_bolts.BLOCKS,
    **pytorchcv.BLOCKS,
    **ultralytics.BLOCKS,
    **wespeaker.BLOCKS,
}
# known classes that are pieces of blocks
LAYERS = (
    *torchvision.LAYERS,
    *timm.LAYERS,
    *kornia.LAYERS,
    *openmmlab.LAYERS,
    *pytorchcv.LAYERS,
    *ultralytics.LAYERS,
)
# plain nn.Sequentials that a model calls, by their names in it (* is any one part): chains by what they hold
SEQUENTIALS: dict[str, tuple[str, ...]] = {**torchvision.SEQUENTIALS, **timm.SEQUENTIALS, **openmmlab.SEQUENTIALS}
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
