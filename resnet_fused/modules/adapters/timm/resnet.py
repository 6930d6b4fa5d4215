"""timm's ResNet: deep stems, anti-aliasing, dropped regions, attention behind the last norm."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.adapters.timm.attention import gate_and_tail
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    Modules,
    StageModules,
    StepModules,
    class_path,
    is_norm,
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


def stem(model: nn.Module) -> BlockModules:
    """conv1, bn1 and act1, where a deep stem's conv1 holds stages of its own; then a pooling that is a convolution."""
    if type(model.conv1) is not nn.Sequential and not pools_with_convolution(model):
        return BlockModules((StageModules(model.conv1, model.bn1, model.act1),), "none")  # type: ignore[arg-type]
    modules = [model.conv1]
    if type(model.conv1) is nn.Sequential:
        require_no_hooks("conv1", model.conv1)
        modules = list(model.conv1.children())
    modules += [model.bn1, model.act1]
    if pools_with_convolution(model):
        require_no_hooks("maxpool", model.maxpool)  # type: ignore[arg-type]
        modules += list(model.maxpool.children())  # type: ignore[union-attr]
    steps = sequential.chains(modules)  # type: ignore[arg-type]
    if len(steps) != 1 or not isinstance(steps[0], BlockModules):
        names = ", ".join(type(part).__name__ for part in modules)
        raise NotFusable(f"the stem is {names}; accepted: convolutions, each with a norm and an activation")
    return steps[0]


def pools_with_convolution(model: nn.Module) -> bool:
    """Whether the stem's `maxpool` is a convolution with a norm and an activation (``replace_stem_pool``)."""
    pool = model.maxpool
    return type(pool) is nn.Sequential and len(pool) > 1 and type(pool[0]) is nn.Conv2d and is_norm(pool[1])


BLOCKS: dict[str, Adapter] = {
    "timm.models.resnet.BasicBlock": basic_block,
    "timm.models.resnet.Bottleneck": bottleneck,
    "timm.models.resnet.ResNet": stem,
}
