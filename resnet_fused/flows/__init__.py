"""Residual blocks as steps of an ordinary differential equation x' = F(x, t): explicit, adaptive and implicit."""

from __future__ import annotations

from resnet_fused.flows.branch import Branch
from resnet_fused.flows.flow import Flow
from resnet_fused.flows.implicit import DeepEquilibrium, ImplicitStep, theta_step
from resnet_fused.flows.solvers import (
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    FixedPoint,
    Gmres,
    NewtonKrylov,
    Solution,
)
from resnet_fused.flows.stability import Stability, StabilityError, StabilityWarning, step_stability

__all__ = [
    "Anderson",
    "Branch",
    "ConvergenceError",
    "ConvergenceWarning",
    "DeepEquilibrium",
    "FixedPoint",
    "Flow",
    "Gmres",
    "ImplicitStep",
    "NewtonKrylov",
    "Solution",
    "Stability",
    "StabilityError",
    "StabilityWarning",
    "step_stability",
    "theta_step",
]
