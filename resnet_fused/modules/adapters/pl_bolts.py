"""Lightning Bolts' copies of torchvision's ResNet, for its self-supervised models."""

from __future__ import annotations

from resnet_fused.modules.adapters.resnet import basic_block, bottleneck
from resnet_fused.modules.block_modules import Adapter

BLOCKS: dict[str, Adapter] = {
    f"pl_bolts.models.self_supervised.{module}.{name}": adapter
    for module in ("resnets", "swav.swav_resnet")
    for name, adapter in {"BasicBlock": basic_block, "Bottleneck": bottleneck}.items()
}
