"""The solvers on equations whose solution is known, row by row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from resnet_fused.flows import Anderson, ConvergenceError, FixedPoint, Gmres, NewtonKrylov
from resnet_fused.flows.solvers import Krylov, Solution, Solver, gmres, report_failure

SOLVERS: tuple[Solver, ...] = (FixedPoint(), Anderson(), Anderson(2, damping=0.7), NewtonKrylov(), NewtonKrylov(3))


def matrix(radius: float, size: int = 12, seed: int = 0) -> Tensor:
    m = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return m * (radius / float(torch.linalg.matrix_norm(m, 2)))


def right(rows: int = 3, size: int = 12) -> Tensor:
    return torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(solver: Solver, m: Tensor, b: Tensor, tol: float = 1e-12, bend: float = 1.0) -> Solution:
    """z = b + M (bend tanh(z) + (1 - bend) z)."""

    def g(z: Tensor) -> Tensor:
        return b + (bend * torch.tanh(z) + (1 - bend) * z) @ m.T

    def derivative(z: Tensor) -> Callable[[Tensor], Tensor]:
        slope = bend * (1 - torch.tanh(z) ** 2) + (1 - bend)
        return lambda v: (slope * v) @ m.T - v

    return solver.solve(lambda z: g(z) - z, b, tol, derivative)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_solves_a_nonlinear_equation(solver: Solver) -> None:
    m, b = matrix(0.6), right()
    found = run(solver, m, b)
    assert bool(found.converged.all())
    off = b + torch.tanh(found.z) @ m.T - found.z
    sizes = found.z.norm(dim=1)
    assert bool((off.norm(dim=1) <= 2e-12 * sizes).all())  # tol is 1e-12 of |g|, which is |z| to that
    assert torch.equal(found.residuals[-1] <= found.tol, found.converged)
    assert found.residuals.shape == (int(found.iterations.max()) + 1, 3)


@pytest.mark.parametrize("solver", (*SOLVERS, Gmres()), ids=lambda s: s.name)
def test_a_row_is_solved_as_if_alone(solver: Solver) -> None:
    """Easy and hard rows together, stopped at different times; equal but for the order of sums in batched products."""
    m, b = matrix(0.6), right() * torch.tensor([[1.0], [1e-3], [30.0]], dtype=torch.float64)
    bend = 0.0 if isinstance(solver, Gmres) else 1.0
    together = run(solver, m, b, tol=1e-8, bend=bend)
    for i in range(3):
        alone = run(solver, m, b[i : i + 1], tol=1e-8, bend=bend)
        assert int(alone.iterations) == int(together.iterations[i])
        torch.testing.assert_close(together.z[i], alone.z[0], rtol=1e-9, atol=1e-12)
    if not isinstance(solver, Gmres):
        assert len(set(together.iterations.tolist())) > 1


def test_anderson_needs_fewer_iterations_than_picard_and_is_gmres_on_linear_equations() -> None:
    """Walker & Ni 2011, theorem 2.2: without truncation Anderson is GMRES one iteration later, as long as the latter
    does not stagnate, so on 12 unknowns at most 13; in floating point a few more."""
    m, b = matrix(0.9), right()
    picard, anderson = (run(s, m, b, tol=1e-9, bend=0.0) for s in (FixedPoint(2000), Anderson(12)))
    assert bool(anderson.converged.all())
    assert int(anderson.iterations.max()) <= 16
    assert int(picard.iterations.max()) > 2 * int(anderson.iterations.max())


def test_newton_needs_no_contraction() -> None:
    """M of norm 5 and skew: g expands, I - M is regular."""
    m = matrix(1.0)
    m = 5 * (m - m.T) / float(torch.linalg.matrix_norm(m - m.T, 2))
    b = right()
    found = run(NewtonKrylov(), m, b, bend=0.0)
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - m, b.T).T
    torch.testing.assert_close(found.z, exact, rtol=1e-10, atol=1e-10)  # tol 1e-12, condition number about 5
    assert not bool(run(FixedPoint(50), m, b, bend=0.0).converged.any())


def test_newton_converges_quadratically_and_backtracks() -> None:
    """z = b - 8 tanh(z): from z = b the full step overshoots; then, with linear solves to rounding, each residual is of
    the order of the square of the one before."""
    m, b = -8 * torch.eye(4, dtype=torch.float64), 3 * torch.ones(1, 4, dtype=torch.float64)
    found = run(NewtonKrylov(forcing=1e-12), m, b, tol=1e-14)
    residuals = found.residuals[:, 0]
    assert bool(found.converged) and bool((residuals.diff() < 0).all())  # each step reduces it
    small = [(a, c) for a, c in pairwise(residuals) if 1e-6 < a < 1e-1]
    assert small and all(float(c) <= 20 * float(a) ** 2 for a, c in small)  # 20: of the second derivative, measured 3


def test_gmres_solves_in_as_many_steps_as_there_are_eigenvalues() -> None:
    """A minimal polynomial of degree 2; the space is then exhausted, which must not spoil it."""
    a = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64))
    calls = []
    b = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    s = gmres(lambda v: (calls.append(1), v @ a)[1], b, 1e-14 * torch.ones(3, 1, dtype=torch.float64), 4)
    torch.testing.assert_close(s, b / a.diagonal(), rtol=1e-13, atol=1e-13)  # float64
    assert len(calls) == 2
    s = gmres(lambda v: v @ a, b, torch.zeros(3, 1, dtype=torch.float64), 4)  # never satisfied
    torch.testing.assert_close(s, b / a.diagonal(), rtol=1e-13, atol=1e-13)


def test_an_exhausted_krylov_space_ends() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64))
    space = Krylov(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64), 4)
    for _ in range(4):
        space.extend(lambda v: v @ a)
    v = space.v[0]
    torch.testing.assert_close(v[:2] @ v[:2].T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-15)  # float64
    assert not bool(v[2:].any()) and not bool(space.h[0, 2:].any())


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_tol_is_relative(solver: Solver) -> None:
    """A solution of the size 1e-6 to six digits; |(I - M)^-1| is at most 1 / (1 - 0.6)."""
    m, b = matrix(0.6), 1e-6 * right()
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - m, b.T).T
    found = run(solver, m, b, tol=1e-6, bend=0.0)
    assert bool(((found.z - exact).norm(dim=1) <= 2.5e-6 * exact.norm(dim=1)).all())


def test_gmres_restarts() -> None:
    m, b = matrix(0.9), right()
    found = run(Gmres(krylov=3, restarts=60), m, b, bend=0.0)
    assert bool(found.converged.all()) and int(found.iterations.max()) > 1


def test_zero_is_solved_at_once() -> None:
    for solver in (*SOLVERS, Gmres()):
        found = run(solver, matrix(0.6), torch.zeros(2, 12, dtype=torch.float64), bend=0.0)
        assert bool(found.converged.all()) and int(found.iterations.max()) == 0
        assert not bool(found.z.any())


def test_what_is_not_finite_stops_that_row_only() -> None:
    b = right()
    b[1, 0] = float("nan")
    for solver in SOLVERS[:4]:
        found = run(solver, matrix(0.6), b)
        assert found.converged.tolist() == [True, False, True]
        assert int(found.iterations[1]) == 0
        with pytest.raises(ConvergenceError, match="for 1 of 3 samples"):
            report_failure("it", solver, found, "raise")


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="got memory=0; accepted: at least 1"):
        Anderson(0)
    with pytest.raises(ValueError, match="got damping="):
        Anderson(damping=1.5)
    with pytest.raises(ValueError, match="forcing=1"):
        NewtonKrylov(forcing=1)
    with pytest.raises(ValueError, match="max_iterations=0; accepted: at least 1"):
        FixedPoint(0)
