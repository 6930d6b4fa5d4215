"""CLIP's ResNets, OpenAI's and OpenCLIP's: average pooling before each convolution that would have a stride."""

from __future__ import annotations

from torch import nn

from resnet_fused.modules.adapters.resnet import chain, with_skip
from resnet_fused.modules.block_modules import Adapter, BlockModules, Modules, StepModules, require_no_hooks


def open_clip_bottleneck(block: nn.Module) -> Modules:
    return _bottleneck(block, ("act1", "act2", "act3"))


def openai_bottleneck(block: nn.Module) -> Modules:
    return _bottleneck(block, ("relu1", "relu2", "relu3"))


def _bottleneck(block: nn.Module, acts: tuple[str, ...]) -> Modules:
    """arXiv:2103.00020, section 2.4."""
    stages, pool = chain(block, acts), block.avgpool
    branch: tuple[StepModules, ...] = ()
    if type(pool) is nn.Identity:
        require_no_hooks("avgpool", pool)
    else:
        branch, stages = (BlockModules(stages[:2], "none"), pool), stages[2:]  # type: ignore[assignment]
    return with_skip(stages, block.downsample, branch=branch)  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "open_clip.modified_resnet.Bottleneck": open_clip_bottleneck,
    "clip.model.Bottleneck": openai_bottleneck,
}
