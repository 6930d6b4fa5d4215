"""timm's ResNet parts: torchvision's, with more slots, which must be empty."""

from __future__ import annotations

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import resnet
from resnet_fused.modules.block_modules import BlockModules, StageModules, require_no_hooks

SLOTS = ("drop_block", "aa", "se", "drop_path")  # stochastic depth, anti-aliasing, attention


def basic_block(block: nn.Module) -> BlockModules:
    _require_empty_slots(block)
    return resnet.chain(block, acts=("act1", "act2"))


def bottleneck(block: nn.Module) -> BlockModules:
    _require_empty_slots(block)
    return resnet.chain(block, acts=("act1", "act2", "act3"))


def stem(model: nn.Module) -> BlockModules:
    """conv1, bn1 and act1. A deep stem's conv1 is a Sequential, which `describe` refuses."""
    return BlockModules((StageModules(model.conv1, model.bn1, model.act1),), skip="none")  # type: ignore[arg-type]


def _require_empty_slots(block: nn.Module) -> None:
    for slot in SLOTS:
        module = getattr(block, slot, None)
        if module is None:
            continue
        if type(module) is not nn.Identity:
            raise NotFusable(f"{slot} is {type(module).__name__}; accepted: none, or nn.Identity")
        require_no_hooks(slot, module)
