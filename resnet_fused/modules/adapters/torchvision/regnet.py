"""torchvision's RegNets."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.torchvision.gates import squeeze_excitation
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    StepModules,
    require_no_hooks,
)


def regnet_block(block: nn.Module) -> BlockModules | CompositeModules:
    """arXiv:2003.13678: f = a, b, squeeze-excitation or none, c; the skip path is x or `proj`."""
    branch_modules = block.f
    require_no_hooks("f", branch_modules)  # type: ignore[arg-type]
    names = [name for name, _ in branch_modules.named_children()]  # type: ignore[union-attr]
    if names not in (["a", "b", "c"], ["a", "b", "se", "c"]):
        raise NotFusable(f"f has the parts {', '.join(names)}; accepted: a, b, se, c, without se or with it")
    first, second, last = (sequential.stage(f"f.{name}", getattr(branch_modules, name)) for name in "abc")
    last = replace(last, act=block.activation)  # type: ignore[arg-type]
    projection = None if block.proj is None else sequential.stage("proj", block.proj)  # type: ignore[arg-type]
    if "se" not in names:
        skip = "identity" if projection is None else "projection"
        return BlockModules((first, second, last), skip, projection)  # type: ignore[arg-type]
    gate = squeeze_excitation("f.se", branch_modules.se)  # type: ignore[union-attr]
    branch: tuple[StepModules, ...] = (BlockModules((first, second), "none", order="branch", gate=gate),)
    skip_path = () if projection is None else (BlockModules((projection,), "none"),)
    return CompositeModules(branch, BlockModules((last,), "none"), skip_path)


BLOCKS: dict[str, Adapter] = {
    "torchvision.models.regnet.ResBottleneckBlock": regnet_block,
    "torchvision.models.regnet.SimpleStemIN": sequential.chain,
}
