"""Implicit blocks: the equation is solved, the gradient is that of unrolled autograd, memory does not grow."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused.flows import (
    Anderson,
    Branch,
    ConvergenceError,
    ConvergenceWarning,
    DeepEquilibrium,
    FixedPoint,
    Flow,
    Gmres,
    ImplicitStep,
    NewtonKrylov,
    theta_step,
)
from resnet_fused.flows.implicit import solve
from resnet_fused.flows.measure import (
    contractive_branch,
    decay,
    heat_branch,
    memory_against_iterations,
    unrolled,
)
from resnet_fused.flows.solvers import Solver

SOLVERS: tuple[Solver, ...] = (FixedPoint(), Anderson(), NewtonKrylov())
BACKWARD: tuple[Solver, ...] = (Gmres(), Anderson(), FixedPoint())


def picture(dtype: torch.dtype = torch.float64, size: int = 4, batch: int = 3, seed: int = 1) -> Tensor:
    x = torch.randn(batch, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def branch_with_norm(dtype: torch.dtype = torch.float64, time_dependent: bool = False) -> Branch:
    torch.manual_seed(0)
    net = (nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(), nn.Conv2d(5, 4, 3, padding=1))
    branch = Branch(*net, time_dependent=time_dependent)
    for c in branch.time_biases or ():
        nn.init.normal_(c)
    return branch.to(dtype).eval()


@pytest.mark.parametrize("theta", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_solves_the_theta_scheme(solver: Solver, dtype: torch.dtype, theta: float) -> None:
    branch, x, dt = branch_with_norm(dtype, time_dependent=True), picture(dtype), 0.4
    with torch.no_grad():
        z, report = theta_step(branch, x, dt, 0.2, theta=theta, solver=solver)
        exact = copy.deepcopy(branch).double()
        wide, z64 = x.double(), z.double()
        off = wide + dt * ((1 - theta) * exact(wide, 0.2) + theta * exact(z64, 0.2 + dt)) - z64
    assert z.dtype == dtype
    # the residual of each sample is below tol (1e-10, 1e-5) times |z|; twice for float32's rounding of F
    assert bool((off.flatten(1).norm(dim=1) <= 2 * report.tol * z64.flatten(1).norm(dim=1)).all())
    assert report.residuals.shape[1] == len(x) and bool(report.converged.all()) and report.z.numel() == 0


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda s: s.name)
def test_bfloat16(solver: Solver) -> None:
    """Within tol (1e-2) over the contraction's distance from 1 (about 0.6), and F's rounding, of float64's solution."""
    branch, x = contractive_branch(4, dtype=torch.bfloat16), picture(torch.bfloat16)
    z, report = solve(branch, x, solver=solver)
    exact, _ = solve(copy.deepcopy(branch).double(), x.double(), solver=solver)
    assert z.dtype == torch.bfloat16 and bool(report.converged.all())
    assert float((z.double() - exact).detach().norm()) <= 3e-2 * float(exact.detach().norm())
    z.float().sum().backward()
    assert branch.net[0].weight.grad is not None and bool(branch.net[0].weight.grad.isfinite().all())
    with pytest.raises(
        TypeError, match=r"needs float32 or float64, F is computed in torch.bfloat16; accepted here: FixedPoint"
    ):
        solve(branch, x, solver=NewtonKrylov())


def test_autocast() -> None:
    """As bfloat16, but u, z and the gradients stay float32."""
    branch, x = contractive_branch(4), picture(torch.float32).requires_grad_()
    exact, _ = theta_step(copy.deepcopy(branch).double(), x.detach().double(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        z, report = theta_step(branch, x, 0.5)
    assert z.dtype == torch.float32 and report.tol == 1e-2
    assert float((z.detach().double() - exact.detach()).norm()) <= 3e-2 * float(exact.detach().norm())
    z.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_gradcheck(theta: float) -> None:
    torch.manual_seed(0)
    net = (nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 2, 1))
    branch = Branch(*net, time_dependent=True).double().eval()
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    dt, t = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.2))

    def run(x: Tensor, dt: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return theta_step(branch, x, dt, t, theta=theta, tol=1e-13, solver=Anderson())[0]

    # gradcheck's own tolerances; tol 1e-13 is far below the finite difference's error
    assert torch.autograd.gradcheck(run, (x, dt, t, *branch.parameters()))


@pytest.mark.parametrize("backward_solver", BACKWARD, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_is_that_of_unrolled_autograd(dtype: torch.dtype, backward_solver: Solver) -> None:
    branch, u, g = contractive_branch(4, dtype=dtype), picture(dtype).requires_grad_(), picture(dtype, seed=2)
    wanted = (u, *branch.parameters())
    found, _ = solve(branch, u, solver=Anderson(), backward_solver=backward_solver)
    wide = copy.deepcopy(branch).double()
    u64 = u.detach().double().requires_grad_()
    expected = unrolled(wide, u64, 80)  # a contraction of about 0.6: 0.6^80 is 1e-18
    ours = torch.autograd.grad(found, wanted, g)
    theirs = torch.autograd.grad(expected, (u64, *wide.parameters()), g.double())
    # tol is 1e-10 and 1e-5 for both equations; 1 / (1 - 0.6) and the sum over pixels, 10 in all
    limit = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        assert float((a.double() - b).detach().norm()) <= limit * float(b.detach().norm())


def test_deep_equilibrium_with_an_injection() -> None:
    torch.manual_seed(0)
    inject = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).double().train()
    model = DeepEquilibrium(contractive_branch(6, dtype=torch.float64), inject)
    twin = copy.deepcopy(model)
    x, g = picture(), picture().repeat(1, 2, 1, 1)[:, :6]
    z = model(x)
    expected = unrolled(twin.branch, twin.inject(x), 80)  # type: ignore[misc]
    torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-9)  # tol 1e-10
    z.backward(g)
    expected.backward(g)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-8)  # tol 1e-10, twice, and sums over pixels
    assert model.report is not None and bool(model.report.converged.all())


def test_warm_start() -> None:
    branch, x = contractive_branch(4, dtype=torch.float64), picture()
    model = DeepEquilibrium(branch, solver=FixedPoint())
    z = model(x)
    assert model.report is not None
    cold = int(model.report.iterations.max())
    again = model(x, initial=z)
    assert int(model.report.iterations.max()) == 0 < cold
    torch.testing.assert_close(again, z, rtol=0, atol=0)
    model(x * 1.001, initial=z)
    assert 0 < int(model.report.iterations.max()) < cold


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_warm_start_of_a_step(theta: float) -> None:
    branch, x = branch_with_norm(), picture()
    z, cold = theta_step(branch, x, 0.4, theta=theta)
    _, warm = theta_step(branch, x, 0.4, theta=theta, initial=z)
    assert int(warm.iterations.max()) == 0 < int(cold.iterations.min())


def test_the_block_may_be_written_into() -> None:
    branch, x = contractive_branch(4, dtype=torch.float64), picture()
    z, _ = solve(branch, x, solver=Anderson())
    nn.functional.relu_(z).sum().backward()
    assert branch.net[0].weight.grad is not None


def test_memory_does_not_depend_on_the_iterations() -> None:
    """At most two tensors of the block's input's size are kept: z and the inner convolution's output."""
    through, implicit = memory_against_iterations((1, 5, 20), size=6)
    assert [s.inputs for s in through] == [2, 10, 40]
    assert [s.inputs for s in implicit] == [2, 2, 2]
    assert len({s.units for s in implicit}) == 1


def test_stiff() -> None:
    """dt times the spectral radius is 7.9: explicit steps amplify, A-stable ones do not (docs/theory)."""
    found = decay(size=12)
    assert found.radius > 7
    assert found.sizes["euler"][-1] > 1e6 and found.sizes["rk4"][-1] > 1e6
    for method in ("backward_euler", "crank_nicolson"):
        sizes = found.sizes[method]
        assert all(b < a for a, b in pairwise(sizes))
        # of first and second order, and after ten steps only smooth modes are left: within 15 % of the exact solution
        assert sizes[-1] == pytest.approx(found.sizes["exact"][-1], rel=0.15)


def test_stiff_gradient() -> None:
    """Backward Euler on x' = A x is (I - dt A)^-1 x: the adjoint is the transpose, A symmetric."""
    branch, x, g = (
        heat_branch(100.0),
        torch.randn(1, 1, 5, 5).double().requires_grad_(),
        torch.randn(1, 1, 5, 5).double(),
    )
    z, _ = theta_step(branch, x, 0.05, tol=1e-12)
    (dx,) = torch.autograd.grad(z, x, g)
    columns = torch.eye(25, dtype=torch.float64).reshape(25, 1, 5, 5)
    matrix = torch.eye(25, dtype=torch.float64) - 0.05 * branch(columns).reshape(25, 25).detach().T
    torch.testing.assert_close(z.flatten(), torch.linalg.solve(matrix, x.flatten()), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dx.flatten(), torch.linalg.solve(matrix.T, g.flatten()), rtol=1e-9, atol=1e-10)


def test_failure_raises_or_warns_with_the_history() -> None:
    branch, x = heat_branch(100.0), torch.ones(2, 1, 4, 4, dtype=torch.float64)
    x[1] = 0  # solved at once
    step = ImplicitStep(branch, 0.1, solver=FixedPoint(10))
    with pytest.raises(
        ConvergenceError,
        match=r"backward Euler by fixed point iteration has not converged for 1 of 2 samples after 10 iterations: "
        r"the relative residual of sample 0 went .*, \.\.\., .*, wanted 1.0e-10; take a smaller step",
    ) as error:
        step(x)
    solution = error.value.solution
    assert solution.converged.tolist() == [False, True]
    assert solution.residuals.shape == (11, 2) and bool((solution.residuals[1:, 0] > 0.5).all())
    step.on_failure = "warn"
    with pytest.warns(ConvergenceWarning, match="for 1 of 2 samples"):
        z = step(x)
    assert step.report is not None and step.report.converged.tolist() == [False, True]
    assert not bool(z[1].any())


def test_failure_of_the_adjoint_raises() -> None:
    branch = heat_branch(100.0)
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    z, _ = theta_step(branch, x, 0.1, backward_solver=FixedPoint(5))
    with pytest.raises(ConvergenceError, match="the adjoint of backward Euler by fixed point iteration"):
        z.sum().backward()


def test_a_loss_of_some_samples_only() -> None:
    """A sample without gradient is an adjoint equation with zero on the right."""
    branch, x = contractive_branch(4, dtype=torch.float64), picture().requires_grad_()
    z, _ = solve(branch, x, solver=Anderson())
    (dx,) = torch.autograd.grad(z[0].sum(), x)
    assert bool(dx[0].any()) and not bool(dx[1:].any())


def test_layouts_and_dtypes_are_kept() -> None:
    branch, x = contractive_branch(4), picture(torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format).requires_grad_()
        z, _ = solve(branch, given, solver=Anderson())
        assert z.is_contiguous(memory_format=memory_format)
        (dx,) = torch.autograd.grad(z.sum(), given)
        assert dx.shape == x.shape


def test_second_derivatives_are_refused() -> None:
    branch, x = contractive_branch(4, dtype=torch.float64), picture().requires_grad_()
    z, _ = solve(branch, x, solver=Anderson())
    (dx,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        dx.square().sum().backward()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"h": float("nan")}, "h is nan; accepted: finite"),
    ({"h": torch.zeros(4)}, r"h must hold one value, got \(4,\)"),
    ({"initial": torch.zeros(1, 4, 4, 4)}, r"initial is \(1, 4, 4, 4\), the unknown is \(3, 4, 4, 4\)"),
    ({"tol": 0.0}, r"tol is 0.0; accepted: a relative residual in \(0, 1\)"),
    ({"on_failure": "ignore"}, "on_failure is 'ignore'; accepted: 'raise', 'warn'"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        solve(contractive_branch(4), picture(torch.float32), solver=Anderson(), **arguments)


def test_more_bad_input() -> None:
    x = picture(torch.float32)
    with pytest.raises(ValueError, match=r"theta is 0; accepted: in \(0, 1\], an explicit step is branch.step"):
        theta_step(contractive_branch(4), x, 0.1, theta=0)
    with pytest.raises(ValueError, match=r"backward Euler evaluates F again and again, and the norm of stage 0 .*eval"):
        theta_step(branch_with_norm(torch.float32).train(), x, 0.1)
    with pytest.raises(ValueError, match="skip path gives 4x4x4 but the branch gives 6x4x4"):
        theta_step(Branch(nn.Conv2d(4, 6, 1)), x, 0.1)


def test_in_a_flow() -> None:
    """Options reach the step; five steps of Crank-Nicolson and their gradients."""
    branch, x = branch_with_norm(), picture()
    flow = Flow(branch, 5, T=1.0, method="crank_nicolson", solver=Anderson(), tol=1e-12)
    expected = x
    for _ in range(5):
        expected, _ = theta_step(branch, expected, 0.2, theta=0.5, tol=1e-12)
    torch.testing.assert_close(flow(x), expected, rtol=1e-9, atol=1e-10)  # tol 1e-12, five steps
    flow(x).sum().backward()
    assert branch.net[0].weight.grad is not None


def test_against_torchdeq() -> None:
    """The peer's Anderson solver and implicit gradient on the same block, float64; its tol is 1e-10 relative."""
    torchdeq = pytest.importorskip("torchdeq", reason="the peer of this test")
    branch, u, g = contractive_branch(4, dtype=torch.float64), picture().requires_grad_(), picture(seed=2)
    wanted = (u, *branch.parameters())
    ours, report = solve(branch, u, solver=Anderson())
    solver = torchdeq.get_deq(
        f_solver="anderson", f_max_iter=60, f_tol=1e-10, b_solver="anderson", b_max_iter=60, b_tol=1e-10, ift=True
    )
    solver.train()
    (theirs,), info = solver(lambda z: u + branch(z), torch.zeros_like(u))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, g), torch.autograd.grad(theirs, wanted, g), rtol=1e-6, atol=1e-7
    )
    # of the same method with another memory (theirs 6), from u instead of 0
    assert int(report.iterations.max()) <= int(info["nstep"].max())
