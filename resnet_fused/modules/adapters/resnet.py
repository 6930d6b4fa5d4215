"""torchvision's ResNet parts, and this package's own, which have scales and orders beside the same children."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
    require_no_hooks,
)
from resnet_fused.params import Scale
from resnet_fused.spec import Order, Skip

Act = str | Callable[[Tensor], Tensor] | None


def basic_block(block: nn.Module) -> Modules:
    return with_skip(chain(block, ("relu", "relu")), block.downsample)  # type: ignore[arg-type]


def bottleneck(block: nn.Module) -> Modules:
    return with_skip(chain(block, ("relu", "relu", "relu")), block.downsample)  # type: ignore[arg-type]


def own_basic_block(block: nn.Module) -> BlockModules:
    return _scaled(block, basic_block(block))


def own_bottleneck(block: nn.Module) -> BlockModules:
    return _scaled(block, bottleneck(block))


def pre_basic_block(block: nn.Module) -> BlockModules:
    return _pre_activation(block, convs=2)


def pre_bottleneck(block: nn.Module) -> BlockModules:
    return _pre_activation(block, convs=3)


def stem(model: nn.Module) -> BlockModules:
    """conv1, bn1 and relu; the pooling that follows is `resnet_fused.modules.stem`'s."""
    missing = [name for name in ("conv1", "bn1", "relu", "maxpool") if not hasattr(model, name)]
    if missing:  # what torchvision's IntermediateLayerGetter holds may be no ResNet
        raise NotFusable(f"it has no {', '.join(missing)}; accepted: the parts of a ResNet")
    return BlockModules((_stage(model, 1, "relu"),), skip="none")


def chain(block: nn.Module, acts: tuple[Act, ...], norm: str = "bn") -> tuple[StageModules, ...]:
    """conv1, bn1, acts[0], conv2, ...; acts: names of children, functions, or None for none."""
    return tuple(_stage(block, i, act, norm) for i, act in enumerate(acts, start=1))


def with_skip(
    stages: tuple[StageModules, ...],
    downsample: nn.Module | None,
    *,
    branch: tuple[StepModules, ...] = (),
    gate: Callable[[Tensor], Tensor] | None = None,
    tail: tuple[nn.Module, ...] = (),
    in_place_add: bool = True,
) -> Modules:
    """The block that ends in `stages` and adds the skip path: x, or `downsample`'s convolution and norm."""
    skip = ((), None) if downsample is None else skip_parts(downsample)
    return added(stages, skip, branch=branch, gate=gate, tail=tail, in_place_add=in_place_add)


SkipPath = tuple[tuple[nn.Module, ...], StageModules | None]  # what pools x, then the projection or None for none


def added(
    stages: tuple[StageModules, ...],
    skip: SkipPath | None,
    *,
    branch: tuple[StepModules, ...] = (),
    gate: Callable[[Tensor], Tensor] | None = None,
    tail: tuple[nn.Module, ...] = (),
    order: Order = "post",
    in_place_add: bool = False,
) -> Modules:
    """The block that ends in `stages` and adds the skip path, if it has one.

    branch: what comes before the stages and has parts of its own. With it, or with a pooling, the block is composite.
    tail:   what is called between the last norm and the addition, in place of a gate: the addition is then PyTorch's.
    """
    steps = None if skip is None else skip_steps(*skip)
    if tail:
        act = stages[-1].act if order == "post" else None
        if act is not None:
            stages = (*stages[:-1], replace(stages[-1], act=None))
        after = () if act is None or isinstance(act, str) else (act,)
        whole = (*branch, BlockModules(stages, "none", order=order), *tail)
        return CompositeModules(whole, None, steps, after=after, in_place_add=in_place_add)
    if not branch and (skip is None or not skip[0]):
        projection = None if skip is None else skip[1]
        kind: Skip = "none" if skip is None else "identity" if projection is None else "projection"
        return BlockModules(stages, kind, projection, order, in_place_add=in_place_add, gate=gate)
    end = BlockModules(stages, "none", order=order, in_place_add=in_place_add, gate=gate)
    return CompositeModules(branch, end, steps)


def skip_steps(pools: tuple[nn.Module, ...], projection: StageModules | None) -> tuple[StepModules, ...]:
    """A composite block's skip path: what pools, then the projection as a fused call of its own."""
    return pools if projection is None else (*pools, BlockModules((projection,), "none"))


def _pre_activation(block: nn.Module, convs: int) -> BlockModules:
    """bn1, relu, conv1, bn2, ...; without `bn1` the input is activated already."""
    stages = [_stage(block, i, "relu") for i in range(1, convs + 1)]
    if block.bn1 is None:
        stages[0] = replace(stages[0], act=None)
    projection = None
    if block.downsample is not None:
        pools, projection = skip_parts(block.downsample)  # type: ignore[arg-type]
        if projection.norm is not None or pools:
            raise NotFusable("downsample has more than one part; accepted in pre-activation order: nn.Sequential(conv)")
    skip = "identity" if projection is None else "projection"
    return _scaled(block, BlockModules(tuple(stages), skip, projection, order="pre", in_place_add=True))  # type: ignore[arg-type]


def _scaled(block: nn.Module, modules: Modules) -> BlockModules:
    """With the scales of this package's blocks, or without their skip path."""
    if isinstance(modules, CompositeModules):
        raise NotFusable("downsample pools, beside which the scales of this block have no fused form")
    modules = replace(modules, branch_scale=_scale(block.branch_scale))  # type: ignore[arg-type]
    if not block.skip:
        return replace(modules, skip="none", projection=None)
    return replace(modules, skip_scale=_scale(block.skip_scale))  # type: ignore[arg-type]


def _scale(value: Scale) -> Scale:
    return value if isinstance(value, Tensor) else float(value)


def _stage(module: nn.Module, i: int, act: Act, norm: str = "bn") -> StageModules:
    given = getattr(module, act) if isinstance(act, str) else act
    return StageModules(getattr(module, f"conv{i}"), getattr(module, f"{norm}{i}"), given)


def shortcut_or_none(shortcut: nn.Module) -> nn.Module | None:
    """For `with_skip`, of a block that spells the identity as an empty nn.Sequential or nn.Identity."""
    require_no_hooks("shortcut", shortcut)
    empty = type(shortcut) is nn.Sequential and len(shortcut) == 0
    return None if empty or type(shortcut) is nn.Identity else shortcut


def skip_parts(downsample: nn.Module) -> tuple[tuple[nn.Module, ...], StageModules]:
    """(what pools x first, the convolution with its norm) of an nn.Sequential(pool, conv, norm), the first optional."""
    require_no_hooks("downsample", downsample)
    parts = list(downsample.children())
    conv = next((i for i, part in enumerate(parts) if isinstance(part, nn.Conv2d)), None)
    rest = [] if conv is None else [part for part in parts[conv:] if type(part) is not nn.Identity]
    if type(downsample) is not nn.Sequential or len(rest) not in (1, 2):
        names = ", ".join(type(part).__name__ for part in parts)
        raise NotFusable(
            f"downsample is {type(downsample).__name__}({names}); accepted: nn.Sequential(conv, norm), with a pooling "
            "before it"
        )
    for part in parts[conv:]:
        require_no_hooks("a part of downsample", part)
    pools = tuple(part for part in parts[:conv] if type(part) is not nn.Identity)
    return pools, StageModules(rest[0], rest[1] if len(rest) == 2 else None, act=None)


BLOCKS: dict[str, Adapter] = {
    "resnet_fused.models.resnet.BasicBlock": own_basic_block,
    "resnet_fused.models.resnet.Bottleneck": own_bottleneck,
    "resnet_fused.models.resnet.PreBasicBlock": pre_basic_block,
    "resnet_fused.models.resnet.PreBottleneck": pre_bottleneck,
    "resnet_fused.models.resnet.ResNet": stem,
    "torchvision.models.resnet.BasicBlock": basic_block,
    "torchvision.models.resnet.Bottleneck": bottleneck,
    "torchvision.models.resnet.ResNet": stem,
    "torchvision.models._utils.IntermediateLayerGetter": stem,
}
