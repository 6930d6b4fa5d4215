"""Equations of physics as residual blocks: the convolution holds the stencil, a block is a time step."""

from __future__ import annotations

from resnet_fused.physics.advection import AdvectionDiffusion
from resnet_fused.physics.heat import Heat
from resnet_fused.physics.linear import LinearPDE, UnstableStepError
from resnet_fused.physics.schroedinger import Schroedinger, wave_packet

__all__ = ["AdvectionDiffusion", "Heat", "LinearPDE", "Schroedinger", "UnstableStepError", "wave_packet"]
