"""timm's ConvNormAct, its shortcuts, and the branches with attention between convolutions that its families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import SkipPath, added
from resnet_fused.modules.adapters.timm.attention import Factor, gate_and_tail
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
    original_path,
    require_no_hooks,
)
from resnet_fused.spec import Order

BYOB_DOWNSAMPLE = "timm.models.byobnet.DownsampleAvg"
DOWNSAMPLES = ("timm.models.resnetv2.DownsampleConv", "timm.models.resnetv2.DownsampleAvg")


def conv_norm_act(module: nn.Module) -> Modules:
    """timm's layer on its own."""
    modules, aa = conv_norm_act_parts("", module)
    sequential.require_gain(modules)
    block = BlockModules((modules,), "none")
    return block if aa is None else CompositeModules((block, aa))


def conv_norm_act_parts(name: str, module: nn.Module) -> tuple[StageModules, nn.Module | None]:
    """(its stage, what blurs behind it or None)."""
    norm = module.bn
    if type(norm) is nn.Sequential and len(norm) == 0:
        norm = None  # type: ignore[assignment]
    if norm is None and not name:
        raise NotFusable("it has no norm, and a convolution alone has nothing to fuse with")
    return StageModules(module.conv, norm, None), getattr(module, "aa", None)  # type: ignore[arg-type]


def stage_of(name: str, module: nn.Module) -> StageModules:
    """Of a ConvNormAct within a block."""
    stage, aa = _within(name, module)
    if aa is not None:
        raise NotFusable(f"{name} blurs with {type(aa).__name__}; accepted here: none")
    return stage


def _within(name: str, module: nn.Module) -> tuple[StageModules, nn.Module | None]:
    if original_path(module) != sequential.CONV_NORM_ACT:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: ConvNormAct")
    require_no_hooks(name, module)
    return conv_norm_act_parts(name, module)


def shortcut_parts(downsample: nn.Module) -> SkipPath:
    """RegNet's and ResNet v2's skip path: (what pools, the projection or None for the identity)."""
    require_no_hooks("downsample", downsample)
    if type(downsample) is nn.Identity:
        return (), None
    path = original_path(downsample)
    pools: list[nn.Module] = []
    if path == BYOB_DOWNSAMPLE:
        pools, stage = [downsample.pool], stage_of("shortcut.conv", downsample.conv)  # type: ignore[list-item, arg-type]
    elif path in DOWNSAMPLES:
        pools, conv, norm = [getattr(downsample, "pool", nn.Identity())], downsample.conv, downsample.norm
        require_no_hooks("downsample.norm", norm)  # type: ignore[arg-type]
        norm = None if type(norm) is nn.Identity else norm  # type: ignore[assignment]
        stage = StageModules(conv, norm, None)  # type: ignore[arg-type]
    elif path == sequential.CONV_NORM_ACT:
        stage = stage_of("downsample", downsample)
    elif type(downsample) is nn.Sequential and len(downsample) == 2:
        pools, conv = [downsample[0]], downsample[1]
        stage = StageModules(conv, None, None) if isinstance(conv, nn.Conv2d) else stage_of("downsample.1", conv)
    else:
        stage = StageModules(downsample, None, None)  # a convolution, or refused by name
    return tuple(pool for pool in pools if type(pool) is not nn.Identity), stage


Part = StageModules | Factor | nn.Module | Callable[[Tensor], Tensor]


def parts_of(name: str, module: nn.Module) -> tuple[Part, ...]:
    """Of a ConvNormAct within a block: its stage, and what blurs behind it."""
    stage, aa = _within(name, module)
    return (stage,) if aa is None else (stage, aa)


def with_shortcut(
    parts: Iterable[Part | None],
    shortcut: nn.Module | None,
    *,
    act: nn.Module | None = None,
    attention: nn.Module | None = None,
    drop_path: nn.Module | None = None,
) -> Modules:
    """A branch of convolutions, of attention and of modules that are called between them, and its skip path.

    shortcut: nn.Identity for the identity, None for no skip path.
    act: behind the addition. None: the last part's own stands before it.
    attention, drop_path: what follows the last part, in this order.
    """
    branch, end = branch_and_end(parts)
    if not end:
        raise NotFusable("its branch ends in something else than a convolution with a norm")
    if act is not None:
        end = (*end[:-1], replace(end[-1], act=act))
    order: Order = "branch" if act is None else "post"
    gate, tail = gate_and_tail(attention, drop_path, "attn_last")
    skip = None if shortcut is None else shortcut_parts(shortcut)
    return added(end, skip, branch=branch, gate=gate, tail=tail, order=order)


def branch_and_end(parts: Iterable[Part | None]) -> tuple[tuple[StepModules, ...], tuple[StageModules, ...]]:
    """(everything up to the last part that is no stage, the stages behind it); a factor ends the fused call before."""
    steps: list[StepModules] = []
    run: tuple[StageModules, ...] = ()
    for part in parts:
        if isinstance(part, StageModules):
            run = (*run, part)
        elif isinstance(part, Factor) and run:
            steps.append(BlockModules(run, "none", order="branch", gate=part.gate))
            run = ()
        elif part is not None:
            between = part.module if isinstance(part, Factor) else part
            steps += [BlockModules(run, "none"), between] if run else [between]
            run = ()
    return tuple(steps), run


BLOCKS: dict[str, Adapter] = {
    sequential.CONV_NORM_ACT: conv_norm_act,
}
