"""Implicit blocks: the output is the solution of an equation, z = u + h F(z, t).

    theta scheme:      z = x + (1 - theta) dt F(x, t) + theta dt F(z, t + dt),
                       u = x + (1 - theta) dt F(x, t) and h = theta dt; theta = 1 is backward Euler, 1/2 Crank-Nicolson,
                       both A-stable (Hairer & Wanner 1996, Solving Ordinary Differential Equations II, IV.3)
    deep equilibrium:  z = F(z) + U(x), u = U(x) and h = 1: the input is injected into every iteration
                       (Bai et al. 2019, arXiv:1909.01377)

Forward is found without autograd, by as many fused calls as the solver takes. Then F is evaluated once more with
autograd at the solution, and that is all that is kept. Backward solves the adjoint equation (implicit function theorem)

    w = dL/dz + h J^T w,      J = dF/dz at the solution,

with the gradients of that one evaluation, and passes w on to u, h and the parameters. So memory does not depend on the
number of iterations. Products J v of Newton's method come from `Branch.jvp`.

A norm in F has to have fixed statistics (`eval()`): the batch's would tie the samples to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from resnet_fused import functional
from resnet_fused.flows import solvers
from resnet_fused.flows.branch import Branch, Time, require_finite
from resnet_fused.flows.solvers import Anderson, Gmres, NewtonKrylov, OnFailure, Solution, Solver
from resnet_fused.params import Scale

NARROW = (torch.bfloat16, torch.float16)


def solve(
    branch: Branch,
    u: Tensor,
    h: Scale = 1.0,
    t: Time = 0.0,
    *,
    solver: Solver,
    backward_solver: Solver | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    on_failure: OnFailure = "raise",
    what: str = "z = u + h F(z)",
) -> tuple[Tensor, Solution]:
    """(z, report) of z = u + h F(z, t), with gradients for u, h, t and the branch's parameters.

    u:        [N, C, H, W]. float32 and float64; 16 bits, and under autocast, with `FixedPoint` and `Anderson`, whose
              vectors are then float32 (a Krylov space needs more digits than 16 bits leave of F).
    h:        a number, or a tensor of one value.
    tol:      relative residual (`solvers`); None: 1e-10 in float64, 1e-5 in float32, 1e-2 in bfloat16.
    initial:  where the solver starts, u's shape; None: u.
    backward_solver: of the adjoint equation, which is linear; None: GMRES.
    on_failure: what to do where a sample does not converge, forward or backward: "raise" ConvergenceError or "warn".
    what:     the equation's name in messages.

    The report has no solution vector: its `z` is empty. Raises ConvergenceError; ValueError for a bad argument, a norm
    with batch statistics, an F that changes the shape of u.
    """
    solvers.check_on_failure(on_failure)
    require_finite("h", h)
    branch.require_fixed_norms(what)
    if isinstance(h, Tensor) and h.numel() != 1:
        raise ValueError(f"h must hold one value, got {tuple(h.shape)}")
    if initial is not None and initial.shape != u.shape:
        raise ValueError(
            f"initial is {tuple(initial.shape)}, the unknown is {tuple(u.shape)}; they must be of one shape"
        )
    dtype = _computed_in(u)
    if dtype in NARROW and isinstance(solver, (NewtonKrylov, Gmres)):
        raise TypeError(
            f"{solver.name} needs float32 or float64, F is computed in {dtype}; accepted here: FixedPoint, Anderson"
        )
    tol = solvers.tolerance(tol, dtype)
    with torch.no_grad():
        solution = _forward(branch, u.detach(), h, t, solver, tol, initial)
    solvers.report_failure(what, solver, solution, on_failure)
    z = to_picture(solution.z, u)
    report = solution._replace(z=solution.z[:, :0])
    differentiable = (v for v in (u, h, t, *branch.parameters()) if isinstance(v, Tensor))
    if not torch.is_grad_enabled() or not any(v.requires_grad for v in differentiable):
        return z, report
    z.requires_grad_()
    f = u + branch(z, t, scale=h)
    adjoint = _Adjoint(get_gradient_edge(f), z, backward_solver or Gmres(), tol, on_failure, what)
    return _Implicit.apply(f, z.detach(), adjoint), report


def _computed_in(u: Tensor) -> torch.dtype:
    """The dtype of F's convolutions: u's, or autocast's."""
    return functional.autocast_dtype(u) or u.dtype


def _forward(
    branch: Branch, u: Tensor, h: Scale, t: Time, solver: Solver, tol: float, initial: Tensor | None
) -> Solution:
    fixed = to_rows(u)

    def residual(rows: Tensor) -> Tensor:
        z = to_picture(rows, u)
        r = branch.step(z, h, t, skip_scale=-1.0)  # h F(z) - z in one call
        return to_rows(r) + fixed

    def derivative(rows: Tensor) -> solvers.Map:
        z = to_picture(rows, u)
        return lambda v: to_rows(branch.jvp(z, to_picture(v, u), t)[1]) * h - v

    return solver.solve(residual, fixed if initial is None else to_rows(initial.detach()), tol, derivative)


class _Adjoint:
    """Solves w = g + h J^T w with the gradients of one recorded evaluation f of u + h F(z), of which z is the input."""

    def __init__(
        self, f: GradientEdge, z: Tensor, solver: Solver, tol: float, on_failure: OnFailure, what: str
    ) -> None:
        self._f, self._z, self._solver, self._tol = f, z, solver, tol
        self._on_failure: OnFailure = on_failure
        self._what = f"the adjoint of {what}"

    def __call__(self, g: Tensor) -> Tensor:
        fixed, f, z = to_rows(g), self._f, self._z

        def transposed(v: Tensor) -> Tensor:
            with torch.enable_grad():
                (jtv,) = torch.autograd.grad(f, z, to_picture(v, z), retain_graph=True)
            return to_rows(jtv) - v

        solution = self._solver.solve(lambda w: fixed + transposed(w), fixed, self._tol, lambda _: transposed)
        solvers.report_failure(self._what, self._solver, solution, self._on_failure)
        return to_picture(solution.z, g)


class _Implicit(torch.autograd.Function):
    """z, whose gradient is the adjoint equation's solution and goes to f."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return z.clone()  # the caller may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(g), None, None


def to_rows(picture: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H W C] in at least float32; of channels_last a view."""
    wide = picture.float() if picture.dtype in NARROW else picture
    return wide.permute(0, 2, 3, 1).reshape(len(picture), -1)


def to_picture(rows: Tensor, like: Tensor) -> Tensor:
    """The opposite, in like's dtype and memory format."""
    n, c, h, w = like.shape
    picture = rows.reshape(n, h, w, c).permute(0, 3, 1, 2).to(like.dtype)
    last = like.is_contiguous(memory_format=torch.channels_last)
    return picture.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def theta_step(
    branch: Branch,
    x: Tensor,
    dt: Scale,
    t: Time = 0.0,
    *,
    theta: float = 1.0,
    solver: Solver | None = None,
    backward_solver: Solver | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    on_failure: OnFailure = "raise",
) -> tuple[Tensor, Solution]:
    """(x at t + dt, report) by the theta scheme; theta 1: backward Euler, 1/2: Crank-Nicolson, 0 is refused.

    Arguments and errors as `solve`; solver: None takes NewtonKrylov, which stiff steps need, or in 16 bits Anderson.
    initial: the start, None: x.
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta is {theta!r}; accepted: in (0, 1], an explicit step is branch.step(x, dt)")
    require_finite("dt", dt)
    u = x if theta == 1.0 else branch.step(x, dt * (1 - theta), t)
    return solve(
        branch,
        u,
        dt * theta,
        t + dt if branch.time_dependent else 0.0,
        solver=solver or (Anderson() if _computed_in(x) in NARROW else NewtonKrylov()),
        backward_solver=backward_solver,
        tol=tol,
        initial=x if initial is None else initial,
        on_failure=on_failure,
        what={1.0: "backward Euler", 0.5: "Crank-Nicolson"}.get(theta, f"the theta scheme ({theta})"),
    )


class ImplicitStep(nn.Module):
    """A block whose output solves the theta scheme; arguments as `theta_step`. dt may be an nn.Parameter.

    report: of the last forward, None before.
    """

    def __init__(
        self,
        branch: Branch,
        dt: Scale,
        *,
        theta: float = 1.0,
        solver: Solver | None = None,
        backward_solver: Solver | None = None,
        tol: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.branch, self.dt, self.theta = branch, dt, theta
        self.solver, self.backward_solver, self.tol, self.on_failure = solver, backward_solver, tol, on_failure
        self.report: Solution | None = None

    def forward(self, x: Tensor, t: Time = 0.0, initial: Tensor | None = None) -> Tensor:
        z, self.report = theta_step(
            self.branch,
            x,
            self.dt,
            t,
            theta=self.theta,
            solver=self.solver,
            backward_solver=self.backward_solver,
            tol=self.tol,
            initial=initial,
            on_failure=self.on_failure,
        )
        return z


class DeepEquilibrium(nn.Module):
    """z = F(z) + U(x): a weight-tied ResNet of infinite depth (Bai et al. 2019, arXiv:1909.01377).

    inject: U, computed once; None: x itself. solver: None takes Anderson. The rest as `solve`; forward's `initial` is a
    warm start, the last batch's solution, say. report: of the last forward, None before.
    """

    def __init__(
        self,
        branch: Branch,
        inject: nn.Module | None = None,
        *,
        solver: Solver | None = None,
        backward_solver: Solver | None = None,
        tol: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.branch, self.inject = branch, inject
        self.solver, self.backward_solver, self.tol, self.on_failure = solver, backward_solver, tol, on_failure
        self.report: Solution | None = None

    def forward(self, x: Tensor, initial: Tensor | None = None) -> Tensor:
        u = x if self.inject is None else self.inject(x)
        z, self.report = solve(
            self.branch,
            u,
            solver=self.solver or Anderson(),
            backward_solver=self.backward_solver,
            tol=self.tol,
            initial=initial,
            on_failure=self.on_failure,
            what="a deep equilibrium",
        )
        return z
