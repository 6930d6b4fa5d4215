"""timm's selective kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from resnet_fused.modules.adapters.resnet import with_skip
from resnet_fused.modules.adapters.timm.attention import gate_and_tail
from resnet_fused.modules.adapters.timm.layers import stage_of
from resnet_fused.modules.block_modules import (
    Adapter,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
)


def bottleneck(block: nn.Module) -> Modules:
    """arXiv:1903.06586; conv2, whose paths are ConvNormActs, is called between."""
    first, last = stage_of("conv1", block.conv1), stage_of("conv3", block.conv3)  # type: ignore[arg-type]
    last = replace(last, act=block.act)  # type: ignore[arg-type]
    branch: tuple[StepModules, ...] = (BlockModules((first,), "none"), block.conv2)  # type: ignore[assignment]
    return _with_skip(block, last, branch)


def basic_block(block: nn.Module) -> Modules:
    last = replace(stage_of("conv2", block.conv2), act=block.act)  # type: ignore[arg-type]
    return _with_skip(block, last, (block.conv1,))  # type: ignore[arg-type]


def _with_skip(block: nn.Module, last: StageModules, branch: tuple[StepModules, ...]) -> Modules:
    gate, tail = gate_and_tail(block.se, block.drop_path, "se")  # type: ignore[arg-type]
    return with_skip((last,), block.downsample, branch=branch, gate=gate, tail=tail)  # type: ignore[arg-type]


def attention(module: Any) -> Modules:
    """What a picture's channels are weighted with, for each path: a layer of one pixel.

    x is [N, paths, C, H, W]. The mean over pixels comes first, so that no sum over paths is written.
    """
    paths = module.num_paths
    squeeze = BlockModules((StageModules(module.fc_reduce, module.bn, module.act),), "none")

    def mean(x: Tensor) -> Tensor:
        return x.mean((3, 4)).sum(1)[:, :, None, None]

    def shares(x: Tensor) -> Tensor:
        return x.unflatten(1, (paths, -1)).softmax(1)

    return CompositeModules((mean, squeeze, module.fc_select, shares))


BLOCKS: dict[str, Adapter] = {
    "timm.models.sknet.SelectiveKernelBottleneck": bottleneck,
    "timm.models.sknet.SelectiveKernelBasic": basic_block,
    "timm.layers.selective_kernel.SelectiveKernelAttn": attention,
}
