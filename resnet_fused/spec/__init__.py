"""What a residual block computes, as frozen, hashable values without tensors."""

from __future__ import annotations

from resnet_fused.spec.block import ACTIVATIONS, Activation, BlockSpec, IntPair, Memory, Order, Skip, StageSpec

__all__ = ["ACTIVATIONS", "Activation", "BlockSpec", "IntPair", "Memory", "Order", "Skip", "StageSpec"]
