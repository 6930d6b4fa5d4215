"""`saved_bytes` against counts made by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.saved_bytes import saved_bytes

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
