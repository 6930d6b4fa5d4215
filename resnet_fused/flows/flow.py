"""A flow: the map x(t0) -> x(t0 + T) of x' = F(x, t), as a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resnet_fused.flows import adaptive, explicit, stability
from resnet_fused.flows.branch import Branch, Time, require_finite
from resnet_fused.flows.implicit import theta_step
from resnet_fused.params import Scale

IMPLICIT = {"backward_euler": 1.0, "crank_nicolson": 0.5}  # theta
METHODS = (*explicit.METHODS, *IMPLICIT, *adaptive.METHODS)


class Flow(nn.Module):
    """x(t0) [N, C, H, W] -> x(t0 + T), of the same shape and dtype.

    branch:  F, used in every step (tied weights), or a sequence of branches, one for each step.
    steps:   how many; an adaptive method chooses its own, and takes none.
    dt, T:   the step size, or the time of all steps; one of them. A number or a tensor of one value, which receives
             gradients; an nn.Parameter is registered.
    method:  "euler", "heun", "rk4" (`explicit`), "backward_euler", "crank_nicolson" (`implicit`), or an adaptive one of
             torchdiffeq's, "dopri5" (`adaptive`), which takes one branch and T.
    adjoint: of an adaptive method: gradients by integrating backwards in time.
    check_stability: before the first explicit step, estimate the spectrum of dt * dF/dx at x and hold it against the
             method's stability region; False, "raise" (or True) or "warn". 20 evaluations in plain PyTorch per branch.
    options: of implicit methods those of `theta_step` (solver, tol, on_failure, ...), of adaptive ones rtol and atol.

    Fixed explicit steps take every dtype of `functional.residual_block`. Euler, Heun and RK4 are 1, 2 and 4 fused calls
    per step. Raises ValueError for arguments that do not go together, and for dt or T that are not finite; forward also
    for an F that changes the shape of x.
    """

    dt: Scale | None
    T: Scale | None

    def __init__(
        self,
        branch: Branch | Sequence[Branch],
        steps: int | None = None,
        *,
        dt: Scale | None = None,
        T: Scale | None = None,  # noqa: N803
        method: str = "euler",
        adjoint: bool = False,
        check_stability: bool | Literal["raise", "warn"] = False,
        **options: Any,
    ) -> None:
        super().__init__()
        branches = [branch] if isinstance(branch, Branch) else list(branch)
        _check(branches, steps, dt, T, method, adjoint, check_stability)
        self.branches = nn.ModuleList(branches)
        self.steps, self.method, self.adjoint, self.options = steps, method, adjoint, options
        for name, value in (("dt", dt), ("T", T)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)  # follows `to`
            else:
                setattr(self, name, value)
        self.check_stability: Literal["raise", "warn"] | None
        self.check_stability = ("raise" if check_stability is True else check_stability) or None

    def forward(self, x: Tensor, t0: Time = 0.0) -> Tensor:
        if self.method in adaptive.METHODS:
            branch: Branch = self.branches[0]  # type: ignore[assignment]
            _require_shape_kept(branch, x)
            assert self.T is not None
            chosen: dict[str, Any] = {"method": self.method, "adjoint": self.adjoint, **self.options}
            return adaptive.integrate(branch, x, t0, t0 + self.T, **chosen)
        for state in self.states(x, t0):
            x = state
        return x

    def states(self, x: Tensor, t0: Time = 0.0) -> Iterator[Tensor]:
        """x after each fixed step."""
        if self.steps is None:
            raise ValueError(f"method {self.method!r} has no fixed steps; accepted: {', '.join(explicit.METHODS)}")
        dt, t = self.step_size, t0
        _require_shape_kept(self.branches[0], x)  # type: ignore[arg-type]
        if self.check_stability is not None and self.method in explicit.METHODS:
            growth = explicit.METHODS[self.method].growth
            for branch in self.branches:
                stability.check(branch, x, dt, self.method, growth, t0, self.check_stability)  # type: ignore[arg-type]
        for i in range(self.steps):
            branch = self.branches[i % len(self.branches)]
            if self.method in IMPLICIT:
                x, _ = theta_step(branch, x, dt, t, theta=IMPLICIT[self.method], **self.options)  # type: ignore[arg-type]
            else:
                x = explicit.METHODS[self.method].step(branch, x, dt, t)  # type: ignore[arg-type]
            yield x
            t = t0 + (i + 1) * dt

    @property
    def step_size(self) -> Scale:
        """dt."""
        if self.dt is not None:
            return self.dt
        assert self.T is not None and self.steps is not None
        return self.T / self.steps

    def extra_repr(self) -> str:
        size = f"dt={self.dt}" if self.dt is not None else f"T={self.T}"
        return f"steps={self.steps}, {size}, method={self.method!r}, adjoint={self.adjoint}"


def _check(
    branches: list[Branch],
    steps: int | None,
    dt: Scale | None,
    total: Scale | None,
    method: str,
    adjoint: bool,
    check_stability: object,
) -> None:
    if not branches or not all(isinstance(branch, Branch) for branch in branches):
        given = [type(branch).__name__ for branch in branches]
        raise TypeError(f"a flow takes a Branch or a sequence of them, given: {', '.join(given) or 'none'}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; accepted: {', '.join(map(repr, METHODS))}")
    if (dt is None) == (total is None):
        raise ValueError(f"got dt={dt}, T={total}; give one of them")
    for name, value in (("dt", dt), ("T", total)):
        if value is not None:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} must hold one value, got {tuple(value.shape)}")
            require_finite(name, value)
    if check_stability not in (False, True, "raise", "warn"):
        raise ValueError(f"check_stability is {check_stability!r}; accepted: False, True, 'raise', 'warn'")
    if method in adaptive.METHODS:
        if steps is not None or total is None or len(branches) != 1:
            raise ValueError(
                f"method {method!r} chooses its own steps: give one branch, T and no steps; "
                f"got {len(branches)} branches, T={total}, steps={steps}"
            )
        return
    if adjoint:
        raise ValueError(f"adjoint=True goes with {', '.join(map(repr, adaptive.METHODS))}, method is {method!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"method {method!r} takes a positive number of steps, got steps={steps!r}")
    if len(branches) not in (1, steps):
        raise ValueError(f"got {len(branches)} branches for {steps} steps; accepted: one, or one for each step")


def _require_shape_kept(branch: Branch, x: Tensor) -> None:
    """Raises ValueError where F changes the shape of x, which then cannot be a step."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() != 4:
        return  # the operators refuse it
    shape = branch.output_shape(x)
    if shape != tuple(x.shape):
        raise ValueError(
            f"F maps x {tuple(x.shape)} to {shape}; in x' = F(x) both have one shape: give the last convolution of the "
            "branch x's channels, and its convolutions stride 1 and 'same' padding"
        )
