"""What a residual block computes, as frozen, hashable values without tensors."""

from __future__ import annotations

from resnet_fused.spec.activations import Activation
from resnet_fused.spec.block import BlockSpec, IntPair, Memory, Order, PaddingMode, Skip, StageSpec

__all__ = ["Activation", "BlockSpec", "IntPair", "Memory", "Order", "PaddingMode", "Skip", "StageSpec"]
