"""The scales that theory gives: their formulas, what they promise of Jacobians, and the constraint in training."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import fuse, models, scaling, spectral, unfuse
from resnet_fused.scaling import Contractive, Learnable

NO_NORM: dict[str, Any] = {"norm_layer": lambda width: nn.Identity()}


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def random_jacobian(n: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / math.sqrt(n)


# --- scales by formula -----------------------------------------------------------------------------------------------


def test_depth_scale_keeps_the_mean_square_within_e() -> None:
    """The docstring's count, with branches that keep the mean square exactly: (1 + 1 / L)^L."""
    assert scaling.depth_scale(16) == 0.25
    assert (1 + scaling.depth_scale(1000) ** 2) ** 1000 == pytest.approx(math.e, rel=1e-3)  # 1 - e / 2000 of e


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9])
def test_the_stable_scale_stretches_nothing(beta: float) -> None:
    """The dense norm, at the limit and below; 1e-12 for rounding."""
    for seed in range(5):
        jacobian = random_jacobian(seed=seed)
        limit = scaling.stable_branch_scale(beta, norm(jacobian))
        for share in (1.0, 0.3):
            total = (1 - beta) * torch.eye(12) + share * limit * jacobian
            assert norm(total) <= 1 + 1e-12


def test_the_stable_scale_is_the_largest() -> None:
    """For J = 4 I the norm is 1 at the limit and above it 1e-3 beyond."""
    limit = scaling.stable_branch_scale(0.5, 4.0)
    assert limit == 0.125
    assert norm(0.5 * torch.eye(3) + limit * 4 * torch.eye(3)) == 1
    assert norm(0.5 * torch.eye(3) + 1.01 * limit * 4 * torch.eye(3)) > 1.001
    assert scaling.stable_branch_scale(0.5, 0.0) == math.inf


@pytest.mark.parametrize(
    ("beta", "lipschitz"), [(1.0, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.5, -1.0), (0.5, math.nan)]
)
def test_numbers_that_promise_nothing(beta: float, lipschitz: float) -> None:
    with pytest.raises(ValueError, match=rf"got beta={beta!r}, lipschitz={lipschitz!r}; accepted: 0 <= beta < 1"):
        scaling.stable_branch_scale(beta, lipschitz)


def test_the_condition_bound_holds_and_is_reached() -> None:
    """For any J, and with equality for one that has both s and -s as eigenvalues; 1e-12 for rounding."""
    for seed in range(5):
        jacobian = random_jacobian(seed=seed)
        alpha = scaling.condition_bounded_scale(3.0, norm(jacobian), beta=0.2)
        assert float(torch.linalg.cond(0.8 * torch.eye(12) + alpha * jacobian)) <= 3 + 1e-12
    alpha = scaling.condition_bounded_scale(3.0, 2.0, beta=0.2)
    both = 0.8 * torch.eye(2).double() + alpha * torch.diag(torch.tensor([2.0, -2.0])).double()
    assert float(torch.linalg.cond(both)) == pytest.approx(3.0, rel=1e-12)
    with pytest.raises(ValueError, match=r"got condition=0\.5"):
        scaling.condition_bounded_scale(0.5, 1.0)


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_the_optimal_scale_of_a_known_jacobian() -> None:
    """S = diag(1, 2), J = diag(1, 0): singular values 1 + a and 2, so a = 1 is perfect; the grid ends near it."""
    skip, jacobian = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([1.0, 0.0]))
    found = scaling.condition_optimal_scale(jacobian, skip=skip, scales=(0.0, 3.0))
    assert found == pytest.approx(1.0, abs=3e-3)
    # eigenvalues of a rotation by 90 degrees: |1 - beta + a i| is the same for both, whatever a; the first is taken
    assert scaling.condition_optimal_scale(torch.tensor([1j, -1j]), 0.5, scales=(0.2, 1.0)) == 0.2


def test_no_scale_on_a_fine_grid_is_better() -> None:
    """A brute-force search over 2,000 scales finds none whose condition number is 1 % lower."""
    for seed in range(3):
        jacobian, eye = random_jacobian(seed=seed), torch.eye(12, dtype=torch.float64)
        best = scaling.condition_optimal_scale(jacobian, 0.1, scales=(0.2, 4.0))
        reached = float(torch.linalg.cond(0.9 * eye + best * jacobian))
        alphas = torch.linspace(0.2, 4.0, 2000, dtype=torch.float64).view(-1, 1, 1)
        assert reached <= 1.01 * float(torch.linalg.cond(0.9 * eye + alphas * jacobian).min())


def test_eigenvalues_stand_for_a_normal_jacobian() -> None:
    """Symmetric: both searches see the same condition numbers, to fp64 rounding."""
    symmetric = random_jacobian() + random_jacobian().mT
    scales = {"scales": (0.05, 0.5)}
    dense = scaling.condition_optimal_scale(symmetric, 0.3, **scales)  # type: ignore[arg-type]
    assert scaling.condition_optimal_scale(torch.linalg.eigvalsh(symmetric), 0.3, **scales) == dense  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jacobian": torch.ones(3, 2)}, r"got a Jacobian \[3, 2\], skip None"),
        ({"jacobian": torch.ones(3, 3), "skip": torch.ones(2, 2)}, r"skip \[2, 2\]"),
        ({"jacobian": torch.ones(2, 2), "beta": 1.0}, "got beta=1.0"),
        ({"jacobian": torch.ones(2, 2), "scales": (1.0, 1.0)}, r"scales=\(1.0, 1.0\)"),
    ],
)
def test_what_cannot_be_conditioned(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.condition_optimal_scale(**arguments)


def settled(**arguments: Any) -> Any:
    """A small model in fp64 and evaluation, its norms with statistics of noise."""
    torch.manual_seed(0)
    model = models.small_resnet(8, width=4, in_channels=1, **arguments).double()
    for _ in range(20):
        model(torch.randn(16, 1, 6, 6, dtype=torch.float64))
    return model.eval()


def test_advice_is_what_dense_algebra_says() -> None:
    """Condition numbers of the sum before the last ReLU, to 1e-9: from a Jacobian by autograd."""
    block = settled(branch_scale=2.0).layer1[0]
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    advice = scaling.advise(block, x)

    def before_relu(x: Tensor) -> Tensor:
        return x + block.branch_scale * block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))

    assert advice.scale == 2.0
    jacobian = torch.autograd.functional.jacobian(before_relu, x).reshape(64, 64)
    assert advice.condition == pytest.approx(float(torch.linalg.cond(jacobian)), rel=1e-9)
    block.branch_scale = advice.best_scale
    jacobian = torch.autograd.functional.jacobian(before_relu, x).reshape(64, 64)
    assert advice.best_condition == pytest.approx(float(torch.linalg.cond(jacobian)), rel=1e-9)
    assert advice.best_condition < 0.5 * advice.condition


def test_advice_by_lanczos_is_advice_by_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eigenvalues are within 1 %, and a condition number is the root of two of them."""
    pytest.importorskip("scipy")
    block, x = settled().layer1[0], torch.randn(1, 4, 2, 2, dtype=torch.float64)
    dense = scaling.advise(block, x, scales=(0.5, 1.5))
    monkeypatch.setattr(scaling, "DENSE", 1)
    lanczos = scaling.advise(block, x, scales=(0.5, 1.5))
    assert lanczos.condition == pytest.approx(dense.condition, rel=0.01)
    assert lanczos.best_condition <= 1.05 * dense.best_condition  # the best of 9 scales, instead of 97


def test_advice_for_scales_per_channel_and_for_none() -> None:
    block = settled(branch_scale=Learnable(0.0, per_channel=True)).layer1[0]
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    assert scaling.advise(block, x)[:2] == (0.0, 1.0)  # the branch is absent, x alone is perfectly conditioned
    with torch.no_grad():
        block.branch_scale.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0]))
    assert scaling.advise(block, x).scale == 2.5
    with pytest.raises(ValueError, match=r"got x \[2, 4, 4, 4\]"):
        scaling.advise(block, x.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="skip='none'"):
        scaling.advise(models.BasicBlock(4, 4, skip=False), x)


# --- the constraint --------------------------------------------------------------------------------------------------

BETA = 0.4
SCALES: dict[str, dict[str, Any]] = {
    "number": {"branch_scale": 1.0},
    "learned": {"branch_scale": Learnable(1.0)},
    "learned per channel": {"branch_scale": Learnable(1.0, per_channel=True), "skip_scale": Learnable(1.0)},
}


def steps(model: nn.Module, constraint: Contractive, fused_optimizer: bool = False) -> None:
    """Five large steps on noise, which push the weights apart."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=fused_optimizer)
    handle = constraint.attach(optimizer)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 1, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().neg().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    handle.remove()


def measured_norms(model: Any, order: str) -> list[float]:
    """Of each block, without the ReLU behind the sum: the largest of three dense Jacobians' norms."""
    x = torch.randn(3, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = []
    with torch.no_grad():
        x = model.relu(model.bn1(model.conv1(x)))
    for layer in (model.layer1, model.layer2, model.layer3):
        for block in layer:
            g, skip = spectral.paths(*spectral.evaluated(*spectral.described(block)))
            scale = block.branch_scale if isinstance(block.branch_scale, float) else block.branch_scale.view(-1, 1, 1)

            def total(x: Tensor, block: Any = block, g: Any = g, skip: Any = skip, scale: Any = scale) -> Tensor:
                return block.skip_scale * skip(x) + scale * g(x)

            found.append(max(norm(spectral.jacobian(total, one[None])) for one in x))
            with torch.no_grad():
                x = block(x)
    return found


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("norms", [{}, NO_NORM], ids=["batch norm", "no norm"])
def test_blocks_stay_contractive_in_training(order: str, scales: dict[str, Any], norms: dict[str, Any]) -> None:
    """Dense norms of (1 - beta) S + alpha J after five steps: at most 1, and 1e-6 for rounding over the steps.

    Without the constraint the same steps leave blocks above 1, so that it has something to do.
    """
    options = {"skip_scale": 1 - BETA} | scales | norms
    free = settled(order=order, **options)
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    model = copy.deepcopy(free)
    constraint = Contractive(model, BETA, x)
    constraint.apply()
    steps(model.train(), constraint)
    constraint.apply()  # running statistics have moved since the last step; without norms it changes nothing
    assert all(bound.block <= 1 + 1e-6 for bound in constraint.bounds().values())
    assert max(measured_norms(model.eval(), order)) <= 1 + 1e-6

    class Nothing(Contractive):
        def apply(self) -> None:
            pass

    steps(free.train(), Nothing(free, BETA, x))
    assert max(measured_norms(free.eval(), order)) > 1


def test_without_norms_the_bound_holds_after_each_step() -> None:
    """No further apply; fp32 weights, so 1e-5."""
    torch.manual_seed(0)
    model = models.small_resnet(8, width=4, in_channels=1, skip_scale=1 - BETA, **NO_NORM)
    constraint = Contractive(model, BETA, torch.randn(1, 1, 6, 6))
    steps(model, constraint)
    assert all(bound.block <= 1 + 1e-5 for bound in constraint.bounds().values())


@pytest.mark.parametrize("fused_optimizer", [False, True])
def test_what_evaluation_has_folded_follows(fused_optimizer: bool) -> None:
    """Evaluated before and after: the fused model sees the written weights, as an unfused copy does (fp32 rounding)."""
    torch.manual_seed(0)
    model = models.small_resnet(8, width=16, in_channels=1, skip_scale=1 - BETA).eval()
    x = torch.randn(2, 1, 8, 8)
    constraint = Contractive(model, BETA, x)
    with torch.no_grad():
        before = model(x)
    constraint.apply()
    with torch.no_grad():
        after = model(x)
        torch.testing.assert_close(after, unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    steps(model, constraint, fused_optimizer)
    with torch.no_grad():
        torch.testing.assert_close(model(x), unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_enlarged_and_what_is_within_stays() -> None:
    model = settled(branch_scale=1e-4, skip_scale=1 - BETA)
    constraint = Contractive(model, BETA, torch.randn(1, 1, 6, 6, dtype=torch.float64))
    with torch.no_grad():
        for layer in (model.layer2, model.layer3):  # projections below 1, too
            layer[0].downsample[1].weight.mul_(0.1)
    before = copy.deepcopy(model.state_dict())
    constraint.apply()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_frozen_norm_keeps_its_weight() -> None:
    """Then the convolution before it is shrunk."""
    model = settled(skip_scale=1 - BETA)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.weight.requires_grad_(False)
    before = [module.weight.clone() for module in norms]
    constraint = Contractive(model, BETA, torch.randn(1, 1, 6, 6, dtype=torch.float64))
    assert max(bound.block for bound in constraint.bounds().values()) > 1
    constraint.apply()
    assert max(bound.block for bound in constraint.bounds().values()) <= 1 + 1e-9
    assert all(torch.equal(module.weight, weight) for module, weight in zip(norms, before, strict=True))


def test_the_constructor_leaves_the_model_as_it_is() -> None:
    model = fuse(settled(skip_scale=1 - BETA)).train()
    before = copy.deepcopy(model.state_dict())
    constraint = Contractive(model, BETA, torch.randn(2, 1, 6, 6, dtype=torch.float64))
    assert model.training and model.layer1[0].bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(constraint.bounds()) == ["layer1.0", "layer2.0", "layer3.0"]
    assert not model.layer1[0]._forward_pre_hooks


@pytest.mark.parametrize("part", ["conv1", "bn1"])
def test_a_diverged_network_is_noticed(part: str) -> None:
    model = models.small_resnet(8, width=4, in_channels=1)
    constraint = Contractive(model, BETA, torch.randn(1, 1, 6, 6))
    nn.init.constant_(getattr(model.layer2[0], part).weight, math.nan)
    with pytest.raises(ValueError, match=r"not finite|lipschitz=nan"):
        constraint.apply()


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, math.nan])
def test_a_bound_that_is_none(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\), got"):
        Contractive(models.small_resnet(8), beta, torch.randn(1, 3, 8, 8))


def test_a_model_without_residual_blocks() -> None:
    with pytest.raises(ValueError, match="ResNet has no residual block"):
        Contractive(models.small_resnet(8, skip=False), 0.5, torch.randn(1, 3, 8, 8))
