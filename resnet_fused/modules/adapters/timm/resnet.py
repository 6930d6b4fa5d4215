"""timm's ResNet: deep stems, anti-aliasing, dropped regions, attention behind the last norm."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.adapters.timm.attention import gate_and_tail
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    Modules,
    StepModules,
    class_path,
    require_no_hooks,
)


def basic_block(block: nn.Module) -> Modules:
    return _resnet_block(block, ("act1", "act2"), middle=1)


def bottleneck(block: nn.Module) -> Modules:
    return _resnet_block(block, ("act1", "act2", "act3"), middle=2)


def _resnet_block(block: nn.Module, acts: tuple[str, ...], middle: int) -> Modules:
    """middle: how many stages there are before `aa`; `drop_block` stands before the last of their activations."""
    stages = chain(block, acts)
    drop_block, aa = getattr(block, "drop_block", None), getattr(block, "aa", None)
    first = stages[:middle]
    between: list[nn.Module] = []
    if not does_nothing(drop_block):
        between += [drop_block, first[-1].act]  # type: ignore[list-item]
        first = (*first[:-1], replace(first[-1], act=None))
    if not does_nothing(aa):
        between.append(aa)  # type: ignore[arg-type]
    for name, slot in (("drop_block", drop_block), ("aa", aa)):
        if slot is not None and slot not in between:
            require_no_hooks(name, slot)
    branch: tuple[StepModules, ...] = (BlockModules(first, "none"), *between) if between else ()
    end = stages[middle:] if between else stages
    gate, tail = gate_and_tail(block.se, block.drop_path, "se")  # type: ignore[arg-type]
    return with_skip(end, block.downsample, branch=branch, gate=gate, tail=tail)  # type: ignore[arg-type]


def does_nothing(module: object) -> bool:
    """An empty slot, or dropped regions outside of training."""
    if module is None or type(module) is nn.Identity:
        return True
    if class_path(type(module)) == "timm.layers.drop.DropBlock2d":
        return not module.training or module.drop_prob == 0  # type: ignore[attr-defined]
    return False


BLOCKS: dict[str, Adapter] = {
    "timm.models.resnet.BasicBlock": basic_block,
    "timm.models.resnet.Bottleneck": bottleneck,
}
