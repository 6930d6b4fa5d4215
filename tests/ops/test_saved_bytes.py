"""`saved_bytes` against counts made by hand, and what a block saves against what its backward reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.blocks import Case
from support.frozen_blocks import UNIT, check_frozen_block, frozen_bottleneck, gradients, trains, units
from support.matrix import BACKENDS
from support.named_tensors import leaves
from torch import Tensor, nn

from resnet_fused.params import BlockParams
from resnet_fused.spec import Memory, Skip
from resnet_fused.tools.saved_bytes import saved_bytes

FLOAT = 4


def test_counts_each_storage_once_and_no_parameter() -> None:
    weight = nn.Parameter(torch.ones(8))
    x = torch.ones(2, 8)

    def run() -> Tensor:
        y = x * weight  # saves x (and weight)
        return y.view(4, 4).square().sum() + y.exp().sum()  # saves y as a view, and exp's output

    assert saved_bytes(run) == 3 * 16 * FLOAT


def test_a_view_counts_its_whole_storage() -> None:
    weight = nn.Parameter(torch.ones(2))
    x = torch.ones(8, 2)
    assert saved_bytes(lambda: x[:3] * weight) == 16 * FLOAT


def test_nothing_without_autograd() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        assert saved_bytes(lambda: layer(torch.ones(1, 3, 8, 8))) == 0


def test_buffers_are_excluded_on_request() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = torch.ones(2, 3, 4, 4)
    with_buffers = saved_bytes(lambda: norm(x))
    assert with_buffers - saved_bytes(lambda: norm(x), norm.buffers()) == 2 * 3 * FLOAT  # running mean and variance
    assert saved_bytes(lambda: norm(x), norm.buffers()) >= x.numel() * FLOAT


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out = x * weight
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_custom_functions_count_alike() -> None:
    weight = nn.Parameter(torch.ones(8))
    x = torch.ones(2, 8)
    assert saved_bytes(lambda: Product.apply(x, weight)) == 2 * 16 * FLOAT  # x and out


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize(
    ("skip", "stride"), [("none", 1), ("none", 2), ("identity", 1), ("projection", 1), ("projection", 2)]
)
def test_frozen_blocks_keep_what_backward_reads(skip: Skip, stride: int, memory: Memory, backend: str) -> None:
    check_frozen_block(backend, skip, memory, stride)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("stages.2.norm_weight", 10),
        ("stages.2.norm_bias", 10),
        ("stages.1.norm_weight", 6),
        ("projection.norm_bias", 10),
        ("branch_scale", 10),
    ],
)
def test_one_more_gradient(extra: str, expected: int, backend: str) -> None:
    """Of a frozen block with a projection: y_n and y_s are kept where a gradient reads them."""
    case = frozen_bottleneck("projection", scale="[C]")
    x, params, spec = case.build(torch.float64, torch.channels_last)

    def wanted(name: str) -> bool:
        return name == extra or (trains(name) and name != "branch_scale")

    assert units(x.float(), leaves(params_of(case), wanted), spec, backend) == expected
    dout = case.upstream()
    got, exact = (gradients(x, params, spec, b, dout, wanted) for b in (backend, "eager"))
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def params_of(case: Case) -> BlockParams:
    return case.build(torch.float32, torch.channels_last)[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_without_gradient_keeps_nothing(backend: str) -> None:
    """A float, e.g. of a pre-activation block: y_3 4 is neither normalised nor read by the scale's gradient."""
    for case in (frozen_bottleneck("identity", "pre", scale="float"), frozen_bottleneck("identity", scale="float")):
        x, params, spec = case.build(torch.float32, torch.channels_last)
        assert units(x, leaves(params, trains), spec, backend) == 6 + FLOAT / UNIT  # the scale itself
