"""WeSpeaker's ResNets of voices, and pyannote.audio's copy: F.relu, and an empty nn.Sequential for the identity."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from resnet_fused.modules.adapters.resnet import chain, shortcut_or_none, with_skip
from resnet_fused.modules.block_modules import Adapter, Modules


def basic_block(block: nn.Module) -> Modules:
    return with_skip(chain(block, (F.relu, F.relu)), shortcut_or_none(block.shortcut))  # type: ignore[arg-type]


def bottleneck(block: nn.Module) -> Modules:
    return with_skip(chain(block, (F.relu, F.relu, F.relu)), shortcut_or_none(block.shortcut))  # type: ignore[arg-type]


BLOCKS: dict[str, Adapter] = {
    "wespeaker.models.resnet.BasicBlock": basic_block,
    "wespeaker.models.resnet.Bottleneck": bottleneck,
    "pyannote.audio.models.embedding.wespeaker.resnet.BasicBlock": basic_block,
    "pyannote.audio.models.embedding.wespeaker.resnet.Bottleneck": bottleneck,
}
