"""Residual blocks as steps of an ordinary differential equation x' = F(x, t): explicit, adaptive and implicit."""

from __future__ import annotations

from resnet_fused.flows.branch import Branch
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

__all__ = [
    "Anderson",
    "Branch",
    "ConvergenceError",
    "ConvergenceWarning",
    "DeepEquilibrium",
    "FixedPoint",
    "Gmres",
    "ImplicitStep",
    "NewtonKrylov",
    "Solution",
    "theta_step",
]
