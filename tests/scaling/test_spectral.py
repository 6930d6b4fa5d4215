"""Spectral norms against dense singular value decompositions, and Lipschitz bounds against measured Jacobians."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from resnet_fused import fuse, models, spectral
from resnet_fused.scaling import Learnable
from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.spec.activations import KINDS, Activation, activation

CONVS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"kernel_size": 3, "padding": 1}, (6, 5)),
    ({"kernel_size": 3, "padding": 0}, (5, 5)),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, (6, 7)),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, (7, 6)),
    ({"kernel_size": 3, "padding": 1, "groups": 4}, (5, 6)),
    ({"kernel_size": 3, "padding": 1, "groups": 8}, (5, 5)),
    ({"kernel_size": 1}, (4, 4)),
    ({"kernel_size": 1, "stride": 2}, (5, 5)),
    ({"kernel_size": 7, "padding": 3, "stride": 2}, (8, 8)),
    ({"kernel_size": (1, 3), "padding": (0, 1), "stride": (1, 2), "groups": 2}, (4, 6)),
    ({"kernel_size": 3, "padding": "same"}, (1, 1)),
    ({"kernel_size": 3, "padding": 2}, (2, 3)),
]
convs = pytest.mark.parametrize(("arguments", "size"), CONVS, ids=str)


def conv(arguments: dict[str, Any]) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, **arguments).double()


def dense_norm(conv: nn.Conv2d, size: tuple[int, int]) -> float:
    """Of the unrolled operator, column by column."""
    columns = torch.eye(conv.in_channels * math.prod(size), dtype=torch.float64).view(-1, conv.in_channels, *size)
    with torch.no_grad():
        matrix = (conv(columns) - conv(torch.zeros_like(columns))).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


@convs
def test_the_estimate_is_the_dense_norm_from_below(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    """A residual of 1e-5 leaves at most that for the singular value found; from above only fp64 rounding."""
    exact = dense_norm(conv(arguments), size)
    found = spectral.conv_norm(conv(arguments), size, tolerance=1e-5)
    assert (1 - 1e-5) * exact <= found <= (1 + 1e-12) * exact


@convs
def test_the_bound_is_above_the_dense_norm_and_near_it(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    """Below it by fp64 rounding at most; how far above depends on how much of the window is padding."""
    exact, bound = dense_norm(conv(arguments), size), spectral.conv_norm(conv(arguments), size, upper=True)
    assert bound >= (1 - 1e-12) * exact
    if arguments["kernel_size"] == 1:
        assert bound == pytest.approx(exact, rel=1e-12)
    elif size != (1, 1) and arguments["padding"] != 2:
        assert bound <= 1.25 * exact


def test_the_bound_closes_in_as_the_picture_grows() -> None:
    """Borders count less: 10 x 10 pixels within 5 %, where 4 x 4 are off by more."""
    layer = conv({"kernel_size": 3, "padding": 1})
    gaps = [spectral.conv_norm(layer, (n, n), upper=True) / dense_norm(layer, (n, n)) - 1 for n in (4, 10)]
    assert gaps[1] < 0.05 < gaps[0]


def test_a_pointwise_convolution_is_its_matrix() -> None:
    """As torch.nn.utils' spectral norm sees it; its own power iteration ends 1e-9 from the singular value."""
    layer = conv({"kernel_size": 1, "bias": False})
    weight = layer.weight.detach().clone()
    theirs = parametrizations.spectral_norm(layer, n_power_iterations=200)
    theirs.train()
    sigma = float((weight.norm() / theirs.weight.norm()).detach())
    assert spectral.conv_norm(conv({"kernel_size": 1}), (3, 3), upper=True) == pytest.approx(sigma, rel=1e-9)
    assert spectral.conv_norm(conv({"kernel_size": 1}), (3, 3), tolerance=1e-6) == pytest.approx(sigma, rel=1e-6)


def test_a_convolution_of_zeros_and_one_that_does_not_fit() -> None:
    layer = conv({"kernel_size": 3})
    with pytest.raises(ValueError, match=r"a kernel of \(3, 3\) does not fit an input of \(2, 5\)"):
        spectral.conv_norm(layer, (2, 5))
    with pytest.raises(RuntimeError, match=r"after 2 iterations .* take upper=True"):
        spectral.conv_norm(layer, (6, 6), iterations=2)
    nn.init.zeros_(layer.weight)
    assert spectral.conv_norm(layer, (6, 6)) == spectral.conv_norm(layer, (6, 6), upper=True) == 0.0


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_no_activation_is_steeper_than_said(name: str) -> None:
    """On a grid of 1e-4 the largest slope is met to 1e-7 where it is an inner maximum, and exactly elsewhere."""
    slope = torch.tensor([0.25], dtype=torch.float64) if name == "prelu" else None
    z = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)
    activation(name)(z.view(1, 1, 1, -1), slope).sum().backward()
    steepest, said = float(z.grad.abs().max()), activation(name).lipschitz(slope)  # type: ignore[union-attr]
    assert said - 1e-7 <= steepest <= said


def test_slopes_count() -> None:
    assert Activation("leaky_relu", -3.0).lipschitz() == 3.0
    assert activation("prelu").lipschitz(torch.tensor([0.5, -2.0])) == 2.0
    assert activation("relu").lipschitz() == 1.0


# --- blocks ----------------------------------------------------------------------------------------------------------


def block(order: str = "post", projects: bool = False, **scales: Any) -> Any:
    """A small block in evaluation, its batch norms with factors of their own."""
    torch.manual_seed(0)
    cls = models.BasicBlock if order == "post" else models.PreBasicBlock
    downsample = None
    if projects:
        parts = [nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6)]
        downsample = nn.Sequential(*(parts if order == "post" else parts[:1]))
    made = cls(4, 6 if projects else 4, 2 if projects else 1, downsample, **scales).double().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.2, 2)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    return made


def jacobian_norm(function: Any, x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(spectral.jacobian(function, x), 2))


@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_bounds_hold_at_every_point(order: str, projects: bool) -> None:
    """Measured Jacobians, dense, at ten points: never above (1e-12 for rounding), and not below a tenth.

    The product is a bound for the worst case of each part; how far a block is from it is no property of the code, but
    a factor of 10 would be left behind by a forgotten part.
    """
    made = block(order, projects, branch_scale=Learnable(0.7, per_channel=True), skip_scale=-0.6)
    with torch.no_grad():
        made.branch_scale.uniform_(-1, 1)
    bound = spectral.lipschitz(made, (5, 6))
    assert bound == spectral.lipschitz(fuse(copy.deepcopy(made)), (5, 6))
    g, skip = spectral.paths(*spectral.described(made))
    reached = {"branch": 0.0, "skip": 0.0, "block": 0.0}
    for seed in range(10):
        x = torch.randn(1, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for name, function in (("branch", g), ("skip", skip), ("block", made)):
            reached[name] = max(reached[name], jacobian_norm(function, x))
    for name, value in reached.items():
        assert value <= (1 + 1e-12) * getattr(bound, name), name
        assert value >= 0.1 * getattr(bound, name), name


@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_paths_add_up_to_the_block(order: str, projects: bool) -> None:
    made = block(order, projects, branch_scale=0.3, skip_scale=0.8)
    g, skip = spectral.paths(*spectral.described(made))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    total = 0.8 * skip(x) + 0.3 * g(x)
    expected = torch.relu(total) if order == "post" else total
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)  # fp64 rounding


def test_a_linear_block_reaches_its_bound() -> None:
    """Pointwise, without norms and activations, an image of one pixel: the bound of the branch is its norm."""
    made = models.BasicBlock(4, 4, norm_layer=lambda width: nn.Identity()).double().eval()
    made.conv1 = made.conv2 = nn.Conv2d(4, 4, 1, bias=False).double()
    made.relu = nn.Identity()
    with torch.no_grad():
        made.conv1.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).view(4, 4, 1, 1))
    assert spectral.lipschitz(made, (1, 1)) == pytest.approx((9.0, 1.0, 10.0), rel=1e-12)
    assert jacobian_norm(made, torch.ones(1, 4, 1, 1).double()) == pytest.approx(10.0, rel=1e-12)


def test_activations_within_a_branch_count() -> None:
    """Two stages that double x: GELU stands between them, and behind the sum for the block alone."""
    made = models.BasicBlock(1, 1, norm_layer=lambda width: nn.Identity()).double().eval()
    made.conv1 = made.conv2 = nn.Conv2d(1, 1, 1, bias=False).double()
    made.relu = nn.GELU()
    nn.init.constant_(made.conv1.weight, 2.0)
    gelu = KINDS["gelu"].steepest
    assert spectral.lipschitz(made, (2, 2)) == pytest.approx((4 * gelu, 1.0, gelu * (1 + 4 * gelu)), rel=1e-12)


def test_the_first_norm_counts_for_both_paths() -> None:
    """One channel of 3 / sqrt(4) = 1.5, then GELU, then convolutions of 2: the norm behind the first is 1 / sqrt(4)."""
    made: Any = models.PreBasicBlock(1, 1, downsample=nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))).double().eval()
    made.conv1 = made.conv2 = made.downsample[0]
    made.relu = nn.GELU()
    nn.init.constant_(made.conv1.weight, 2.0)
    nn.init.constant_(made.bn1.weight, 3.0)
    for module in (made.bn1, made.bn2):
        module.eps = 0.0
        nn.init.constant_(module.running_var, 4.0)
    gelu = KINDS["gelu"].steepest
    branch, skip = 1.5 * gelu * 2 / 2 * gelu * 2, 1.5 * gelu * 2
    assert spectral.lipschitz(made, (2, 2)) == pytest.approx((branch, skip, branch + skip), rel=1e-12)


def test_what_has_no_constant() -> None:
    with pytest.raises(
        ValueError, match=r"BasicBlock normalises with the statistics of its batch.*call eval\(\) first"
    ):
        spectral.lipschitz(block().train(), (5, 5))
    untracked = models.BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="statistics of its batch"):
        spectral.lipschitz(untracked, (5, 5))
    with pytest.raises(ValueError, match="keeps no running statistics"):
        spectral.block_bounds(*spectral.described(untracked), (5, 5))
    with pytest.raises(TypeError, match=r"Linear is no block class .* register_block"):
        spectral.lipschitz(nn.Linear(3, 3), (5, 5))


def test_specs_of_the_third_order() -> None:
    """The branch's last activation stands before the addition: it belongs to g, and nothing follows the sum."""
    made = block()
    params, spec = spectral.described(made)
    last = StageSpec(1, 1, batch_stats=False, act="gelu")
    yolo = BlockSpec((spec.stages[0], last), "identity", order="branch")
    post = spectral.block_bounds(params, spec, (5, 5))
    found = spectral.block_bounds(params, yolo, (5, 5))
    assert found.branch == pytest.approx(post.branch * KINDS["gelu"].steepest, rel=1e-12)
    assert found.block == pytest.approx(1 + found.branch, rel=1e-12)


@pytest.mark.parametrize("upper", [False, True])
def test_padding_that_holds_values_is_refused(upper: bool) -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        spectral.conv_norm(conv, (5, 5), upper=upper)
