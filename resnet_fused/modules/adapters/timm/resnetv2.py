"""timm's ResNet v2 with batch norms."""

from __future__ import annotations

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters.resnet import skip_steps
from resnet_fused.modules.adapters.timm.attention import drop_path_of
from resnet_fused.modules.adapters.timm.layers import shortcut_parts
from resnet_fused.modules.block_modules import Adapter, BlockModules, CompositeModules, Modules, StageModules


def pre_basic_block(block: nn.Module) -> Modules:
    return _pre_activation(block, convs=2)


def pre_bottleneck(block: nn.Module) -> Modules:
    return _pre_activation(block, convs=3)


def _pre_activation(block: nn.Module, convs: int) -> Modules:
    """norm1 with its activation, conv1, norm2, ...; the projection reads what norm1 gives."""
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"norm{i}")) for i in range(1, convs + 1)]
    gate = drop_path_of(block.drop_path)  # type: ignore[arg-type]
    pools: tuple[nn.Module, ...] = ()
    projection = None
    if block.downsample is not None:
        pools, projection = shortcut_parts(block.downsample)  # type: ignore[arg-type]
    if projection is not None and projection.norm is not None:
        raise NotFusable("downsample has a norm; accepted in pre-activation order: a convolution alone")
    if not pools and (gate is None or projection is None):
        stages = tuple(StageModules(conv, norm, None) for conv, norm in pairs)
        skip = "identity" if projection is None else "projection"
        return BlockModules(stages, skip, projection, order="pre", gate=gate)  # type: ignore[arg-type]
    steps = skip_steps(pools, projection)
    end = BlockModules(behind_first_norm(pairs), "none", gate=gate)
    return CompositeModules((), end, steps, before=(pairs[0][1],))


def behind_first_norm(pairs: list[tuple[nn.Module, nn.Module]]) -> tuple[StageModules, ...]:
    """A pre-activation branch that begins with its first convolution, in post-activation order."""
    norms = [norm for _, norm in pairs[1:]]
    return tuple(StageModules(conv, norm, None) for (conv, _), norm in zip(pairs, [*norms, None], strict=True))


BLOCKS: dict[str, Adapter] = {
    "timm.models.resnetv2.PreActBasic": pre_basic_block,
    "timm.models.resnetv2.PreActBottleneck": pre_bottleneck,
}
