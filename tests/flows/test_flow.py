"""Flows against exact solutions, and what a step costs."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn

from resnet_fused.flows import Branch, Flow
from resnet_fused.flows.explicit import METHODS
from resnet_fused.flows.measure import block_calls, contractive_branch, errors, linear_branch, saved, swirl

needs_torchdiffeq = pytest.mark.skipif(
    importlib.util.find_spec("torchdiffeq") is None, reason="adaptive methods are torchdiffeq's"
)
ADAPTIVE = ({}, {"adjoint": True})


def picture(channels: int = 4, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4), ("backward_euler", 1), ("crank_nicolson", 2)]
)
def test_order_of_convergence(method: str, order: int) -> None:
    """log2 of the errors' ratio at dt = 1/32 and 1/64; the next term of the expansion moves it by O(dt): 0.1 is thrice
    what is measured (1.026, 2.005, 4.006, 0.973, 2.000), and orders are 1 apart."""
    coarse, fine = errors(method, (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_orders_with_time() -> None:
    """x' = A x + t b against expm of the augmented system, (x, t, 1)' linear: RK4 keeps order 4, Heun 2."""
    matrix, b = swirl(), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    augmented = torch.zeros(6, 6, dtype=torch.float64)
    augmented[:4, :4], augmented[:4, 4], augmented[4, 5] = matrix, b, 1.0
    x = picture()
    state = torch.cat([x, torch.full_like(x[:, :1], 0.5), torch.ones_like(x[:, :1])], 1)  # t0 = 0.5
    exact = torch.einsum("ij,njhw->nihw", torch.linalg.matrix_exp(augmented), state)[:, :4]
    for method, order in (("heun", 2), ("rk4", 4)):
        branch = Branch(linear_branch(matrix).net, time_dependent=True)
        assert branch.time_biases is not None
        branch.time_biases[0].data.copy_(b)
        with torch.no_grad():
            off = [float((Flow(branch, n, T=1.0, method=method)(x, t0=0.5) - exact).norm()) for n in (16, 32)]
        assert math.log2(off[0] / off[1]) == pytest.approx(order, abs=0.15)  # dt is twice that of the test above


@pytest.mark.parametrize("method", METHODS)
def test_explicit_methods_are_their_tableaus(method: str) -> None:
    """Against the sums of slopes of the textbooks; nonlinear, in training mode of autograd, with gradients."""
    branch = contractive_branch(4, dtype=torch.float64, gain=2.0)
    x, dt = picture().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    tableaus = {
        "euler": (((),), (1,)),
        "heun": (((), (1,)), (1 / 2, 1 / 2)),
        "rk4": (((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    }
    rows, weights = tableaus[method]
    slopes: list[Tensor] = []
    for row in rows:
        slopes.append(branch.net(x + dt * sum(a * k for a, k in zip(row, slopes, strict=True))))
    expected = x + dt * sum(w * k for w, k in zip(weights, slopes, strict=True))
    found = Flow(branch, 1, dt=dt, method=method)(x)
    wanted = (x, dt, *branch.parameters())
    g = picture(seed=2)
    # float64: the same numbers in another order
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, g), torch.autograd.grad(expected, wanted, g), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize(("method", "steps", "count"), [("euler", 100, 100), ("heun", 10, 20), ("rk4", 10, 40)])
def test_block_calls(method: str, steps: int, count: int) -> None:
    flow = Flow(contractive_branch(4), steps, T=1.0, method=method)
    assert block_calls(lambda: flow(picture(dtype=torch.float32))) == count


def test_euler_keeps_what_its_blocks_keep_and_no_copy() -> None:
    """x and the inner convolution's output of each step; the first x is the caller's."""
    branch, x = contractive_branch(4), picture(dtype=torch.float32)
    one, hundred = (saved(lambda n=n: Flow(branch, n, T=1.0)(x), x) for n in (1, 100))  # type: ignore[misc]
    assert one.units == 2
    scalars = 100 * 4 / (x.numel() * 4)  # dt as a float32 tensor, one for each step
    assert hundred.inputs == 200
    assert hundred.units == pytest.approx(200 + scalars, rel=1e-12)  # a quotient of whole numbers


def test_weights_of_their_own() -> None:
    branches = [linear_branch(swirl() * (i + 1)) for i in range(3)]
    x = picture()
    expected = x
    for branch in branches:
        expected = expected + 0.1 * branch.net(expected)
    flow = Flow(branches, 3, dt=0.1)
    torch.testing.assert_close(flow(x), expected, rtol=1e-12, atol=1e-12)  # float64
    assert len(list(flow.parameters())) == 3


def test_a_learned_time_is_a_parameter() -> None:
    total = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    flow = Flow(linear_branch(swirl()), 64, T=total, method="rk4")
    assert {name for name, _ in flow.named_parameters()} == {"T", "branches.0.net.0.weight"}
    x, g = picture(), picture(seed=2)
    flow(x).backward(g)
    moved = torch.einsum("ij,njhw->nihw", torch.linalg.matrix_exp(swirl()) @ swirl(), x)
    assert total.grad is not None
    # dx(T)/dT = A x(T); RK4's error at dt = 1/64 is 1.4e-8
    torch.testing.assert_close(total.grad, (g * moved).sum(), rtol=1e-6, atol=1e-6)
    assert Flow(linear_branch(swirl()), 2, dt=torch.tensor(0.1)).double().dt.dtype == torch.float64  # type: ignore[union-attr]


def test_under_compile_and_transforms() -> None:
    flow, x = Flow(contractive_branch(4, dtype=torch.float64), 2, T=1.0, method="rk4"), picture()
    out = flow(x)
    out.sum().backward()
    compiled = torch.compile(flow, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), out, rtol=1e-12, atol=1e-12)  # float64
    parameters = dict(flow.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(flow, p, (x,)).sum())(parameters)
    torch.testing.assert_close(grads, {n: p.grad for n, p in parameters.items()}, rtol=1e-12, atol=1e-12)
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(copied(x), flow(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_narrow_dtypes(method: str, dtype: torch.dtype) -> None:
    """No further off than PyTorch's own steps in that dtype, a few roundings apart."""
    x, branch = picture(dtype=dtype), linear_branch(swirl(dtype))
    with torch.no_grad():
        exact = Flow(linear_branch(swirl()), 8, T=1.0, method=method)(x.double())
        fused = Flow(branch, 8, T=1.0, method=method)(x)
        eager = Flow(Branch.of(branch.net, backend="eager"), 8, T=1.0, method=method)(x)
    assert fused.dtype == dtype
    off, allowed = ((out.double() - exact).norm() for out in (fused, eager))
    floor = 4 * torch.finfo(dtype).eps * exact.norm()
    assert float(off) <= 2 * float(allowed) + float(floor)


@needs_torchdiffeq
@pytest.mark.parametrize("options", ADAPTIVE, ids=["through the steps", "adjoint"])
def test_dopri5(options: dict[str, bool]) -> None:
    """Value and gradients against the matrix exponential; tolerances 100 times those that each step is held to."""
    branch, x, g = linear_branch(swirl()), picture().requires_grad_(), picture(seed=2)
    weight = branch.net[0].weight
    found = Flow(branch, T=1.0, method="dopri5", rtol=1e-9, atol=1e-11, **options)(x)
    matrix = swirl().requires_grad_()
    exact = torch.einsum("ij,njhw->nihw", torch.linalg.matrix_exp(matrix), x)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)
    mine, dx = torch.autograd.grad(found, (weight, x), g)
    theirs = torch.autograd.grad(exact, (matrix, x), g)
    torch.testing.assert_close((mine[:, :, 0, 0], dx), theirs, rtol=1e-7, atol=1e-7)


@needs_torchdiffeq
def test_dopri5_sees_time_and_float32() -> None:
    """F(x, t) = t b: x(1) = x + b / 2 exactly; float32's default tolerance is 1e-5."""
    branch = Branch(linear_branch(torch.zeros(4, 4)).net, time_dependent=True)
    assert branch.time_biases is not None
    nn.init.ones_(branch.time_biases[0])
    x = picture(dtype=torch.float32)
    torch.testing.assert_close(Flow(branch, T=1.0, method="dopri5")(x), x + 0.5, rtol=1e-5, atol=1e-5)


@needs_torchdiffeq
def test_adjoint_memory_does_not_depend_on_the_steps() -> None:
    branch, x = contractive_branch(4, gain=2.0), picture(dtype=torch.float32)
    kept = {}
    for rtol in (1e-3, 1e-6):
        for adjoint in (False, True):
            flow = Flow(branch, T=2.0, method="dopri5", rtol=rtol, atol=rtol, adjoint=adjoint)
            kept[rtol, adjoint] = saved(lambda flow=flow: flow(x), x).units  # type: ignore[misc]
    assert kept[1e-6, False] > kept[1e-3, False] > 10 * kept[1e-3, True]
    assert kept[1e-6, True] == kept[1e-3, True]


def test_without_torchdiffeq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="need torchdiffeq: `pip install torchdiffeq`; the fixed steps euler"):
        Flow(linear_branch(swirl()), T=1.0, method="dopri5")(picture())


BAD = [
    ({"steps": 3}, "got dt=None, T=None; give one of them"),
    ({"steps": 3, "dt": 0.1, "T": 1.0}, "got dt=0.1, T=1.0"),
    ({"steps": 3, "dt": float("inf")}, "dt is inf; accepted: finite"),
    ({"steps": 3, "T": torch.tensor(float("nan"))}, "T is tensor"),
    ({"steps": 3, "dt": torch.zeros(2)}, r"dt must hold one value, got \(2,\)"),
    ({"dt": 0.1}, "'euler' takes a positive number of steps, got steps=None"),
    ({"steps": 0, "dt": 0.1}, "got steps=0"),
    ({"steps": 3, "dt": 0.1, "method": "rk5"}, "method is 'rk5'; accepted: 'euler'"),
    ({"steps": 3, "dt": 0.1, "adjoint": True}, "adjoint=True goes with 'dopri5'"),
    ({"steps": 3, "T": 1.0, "method": "dopri5"}, "chooses its own steps"),
    ({"steps": 3, "dt": 0.1, "check_stability": "maybe"}, "check_stability is 'maybe'"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Flow(linear_branch(swirl()), **arguments)  # type: ignore[arg-type]


def test_more_bad_input() -> None:
    x = picture()
    with pytest.raises(ValueError, match="got 2 branches for 3 steps"):
        Flow([linear_branch(swirl())] * 2, 3, dt=0.1)
    with pytest.raises(TypeError, match="given: Conv2d"):
        Flow([nn.Conv2d(4, 4, 1)], 1, dt=0.1)  # type: ignore[list-item]
    wider = Branch(nn.Conv2d(4, 6, 1)).double()
    for arguments in ({"steps": 1, "dt": 0.1, "method": "rk4"}, {"T": 1.0, "method": "dopri5"}):
        with pytest.raises(ValueError, match=r"F maps x \(2, 4, 3, 3\) to \(2, 6, 3, 3\)"):
            Flow(wider, **arguments)(x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x is torch.bfloat16; an adaptive method takes float32 or float64"):
        Flow(linear_branch(swirl(torch.bfloat16)), T=1.0, method="dopri5")(x.bfloat16())
    normed = Branch(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    with pytest.raises(ValueError, match="the adjoint method evaluates F again and again"):
        Flow(normed, T=1.0, method="dopri5", adjoint=True)(x)
    with pytest.raises(ValueError, match="'dopri5' has no fixed steps"):
        next(Flow(linear_branch(swirl()), T=1.0, method="dopri5").states(x))
