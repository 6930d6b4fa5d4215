"""Unstable steps are found before they are taken, with the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused.flows import Flow, StabilityError, StabilityWarning, step_stability
from resnet_fused.flows.explicit import METHODS
from resnet_fused.flows.measure import heat_branch, linear_branch, swirl


def noise(channels: int = 1, size: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_radius_of_the_laplacian(dtype: torch.dtype) -> None:
    """Its smallest eigenvalue is -8 cos^2(pi / (2 (n + 1))); 20 Arnoldi steps come within 1 % of it from inside."""
    found = step_stability(heat_branch(1.0, dtype), noise(dtype=dtype), 0.1, METHODS["euler"].growth)
    exact = 0.8 * float(torch.cos(torch.tensor(torch.pi / 18)) ** 2)
    assert 0.99 * exact <= found.radius <= exact * (1 + 1e-5)
    assert found.stable


def test_complex_eigenvalues_are_found() -> None:
    """-0.3 +- 2i: Euler with dt = 1 has |1 + z| = |0.7 + 2i| = 2.119; RK4 is stable there. The matrix is 4x4, so the
    Krylov space is all of it, to rounding."""
    found = step_stability(linear_branch(swirl()), noise(4), 1.0, METHODS["euler"].growth)
    assert found.radius == pytest.approx(abs(-0.3 + 2j), rel=1e-8)
    assert abs(found.eigenvalue.imag) == pytest.approx(2, rel=1e-8)
    assert found.growth == pytest.approx(abs(0.7 + 2j), rel=1e-8)
    assert found.largest_dt == pytest.approx(0.6 / (0.3**2 + 2**2), rel=1e-3)  # |1 + s z| = 1; a grid of 200 points
    assert step_stability(linear_branch(swirl()), noise(4), 1.0, METHODS["rk4"].growth).stable


@pytest.mark.parametrize(("method", "limit"), [("euler", 2.0), ("heun", 2.0), ("rk4", 2.7853)])
def test_the_limit_on_the_real_axis(method: str, limit: float) -> None:
    """Hairer & Wanner 1996, IV.2: 2, 2 and 2.785; held against dt of 2 % beside it, twice the estimate's error."""
    radius = step_stability(heat_branch(1.0), noise(), 1.0, (1.0, 1.0)).radius
    x = noise()
    for factor, stable in ((0.98, True), (1.02, False)):
        flow = Flow(heat_branch(1.0), 1, dt=factor * limit / radius, method=method, check_stability=True)
        if stable:
            flow(x)
            continue
        with pytest.raises(
            StabilityError, match=rf"a step of {method} with dt=.* spectral radius .* is about"
        ) as error:
            flow(x)
        assert error.value.stability.largest_dt == pytest.approx(limit / radius, rel=1e-2)


def test_a_growing_solution_is_no_instability() -> None:
    flow = Flow(linear_branch(2.0 * torch.eye(4, dtype=torch.float64)), 3, dt=1.0, check_stability=True)
    flow(noise(4))


def test_warns_on_request_and_not_for_implicit_steps() -> None:
    x = noise()
    with pytest.warns(StabilityWarning, match="method='backward_euler' for every dt"):
        Flow(heat_branch(100.0), 1, dt=0.1, check_stability="warn")(x)
    Flow(heat_branch(100.0), 1, dt=0.1, method="backward_euler", check_stability=True)(x)
