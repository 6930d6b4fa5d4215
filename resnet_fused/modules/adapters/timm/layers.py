"""timm's ConvNormAct, its shortcuts, and the bottleneck with attention in its middle that RegNet and ByobNet share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.resnet import skip_steps
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

CONV_NORM_ACT = "timm.layers.conv_bn_act.ConvNormAct"
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
    if original_path(module) != CONV_NORM_ACT:
        raise NotFusable(f"{name} is {type(module).__name__}; accepted: ConvNormAct")
    require_no_hooks(name, module)
    stage, aa = conv_norm_act_parts(name, module)
    if aa is not None:
        raise NotFusable(f"{name} blurs with {type(aa).__name__}; accepted within this block: none")
    return stage


def shortcut_parts(downsample: nn.Module) -> tuple[tuple[nn.Module, ...], StageModules | None]:
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
    elif path == CONV_NORM_ACT:
        stage = stage_of("downsample", downsample)
    elif type(downsample) is nn.Sequential and len(downsample) == 2:
        pools, conv = [downsample[0]], downsample[1]
        stage = StageModules(conv, None, None) if isinstance(conv, nn.Conv2d) else stage_of("downsample.1", conv)
    else:
        stage = StageModules(downsample, None, None)  # a convolution, or refused by name
    return tuple(pool for pool in pools if type(pool) is not nn.Identity), stage


def attended(
    stages: tuple[StageModules, ...],
    attention: Callable[[Tensor], Tensor] | None,
    gate: Callable[[Tensor], Tensor] | None,
    downsample: nn.Module | None,
) -> Modules:
    """A bottleneck with attention before its last convolution, and a gate of its branch.

    downsample: nn.Identity for the identity, None for no skip path.
    """
    branch: tuple[StepModules, ...] = ()
    end = stages
    if attention is not None:
        branch, end = (BlockModules(stages[:-1], "none", order="branch", gate=attention),), stages[-1:]
    if downsample is None:
        whole = BlockModules(end, "none", gate=gate)
        return CompositeModules(branch, whole) if branch else whole
    pools, projection = shortcut_parts(downsample)
    if not branch and not pools:
        skip = "identity" if projection is None else "projection"
        return BlockModules(end, skip, projection, gate=gate)  # type: ignore[arg-type]
    steps = skip_steps(pools, projection)
    return CompositeModules(branch, BlockModules(end, "none", gate=gate), steps)


BLOCKS: dict[str, Adapter] = {
    CONV_NORM_ACT: conv_norm_act,
}
