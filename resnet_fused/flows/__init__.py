"""Residual blocks as steps of an ordinary differential equation x' = F(x, t): explicit, adaptive and implicit."""

from __future__ import annotations

from resnet_fused.flows.branch import Branch

__all__ = ["Branch"]
