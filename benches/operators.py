"""Single operators, native against PyTorch's own operations for the same, under pytest-benchmark.

    pytest benches/operators.py --benchmark-columns=median,iqr,rounds

Each group holds one operator, phase and dtype; the figure in brackets is the ratio to the faster of the two.
RESNET_FUSED_BENCH_SIZE=8 makes the pictures that small, for a try (default: 56, as in ResNet-50's layer1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resnet_fused import functional
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.modules.fuse import fuse

BATCH, CHANNELS, SIZE = 4, 256, int(os.environ.get("RESNET_FUSED_BENCH_SIZE", "56"))
ROUNDS = {"rounds": 10, "warmup_rounds": 2}


class Operator(NamedTuple):
    """call: on x. leaves: what backward gives gradients for."""

    name: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def x(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(0)
    noise = torch.randn(BATCH, CHANNELS, SIZE, SIZE).relu()
    return noise.to(request.param, memory_format=torch.channels_last).requires_grad_()


@pytest.fixture(params=["residual_block", "batch_norm_act", "max_pool2d"])
def operator(request: pytest.FixtureRequest, x: Tensor, backend: str) -> Operator:
    """In training."""
    if request.param == "residual_block":
        block = _block(x, backend)
        return Operator(request.param, lambda: block(x), (x, *block.parameters()))
    if request.param == "batch_norm_act":
        bn = torch.nn.BatchNorm2d(CHANNELS).to(x.dtype)
        skip = x.detach().clone().requires_grad_()
        call = lambda: functional.batch_norm_act(x, bn, residual=skip, backend=backend)  # noqa: E731
        return Operator(request.param, call, (x, skip, *bn.parameters()))
    return Operator(request.param, lambda: functional.max_pool2d(x, 3, 2, 1, backend=backend), (x,))


def _block(x: Tensor, backend: str) -> torch.nn.Module:
    block = Bottleneck(CHANNELS, CHANNELS // 4).to(x.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fuse(block, backend=backend)


def _group(benchmark: Any, what: str, x: Tensor) -> None:
    benchmark.group = f"{what} {str(x.dtype).removeprefix('torch.')}"


def test_forward(benchmark: Any, operator: Operator, x: Tensor) -> None:
    _group(benchmark, f"{operator.name} forward", x)
    benchmark.pedantic(operator.call, **ROUNDS)


def test_backward(benchmark: Any, operator: Operator, x: Tensor) -> None:
    _group(benchmark, f"{operator.name} backward", x)

    def forward() -> tuple[tuple[Tensor, tuple[Tensor, ...], Tensor], dict[str, Any]]:
        out = operator.call()
        return (out, operator.leaves, torch.ones_like(out)), {}

    benchmark.pedantic(torch.autograd.grad, setup=forward, **ROUNDS)


def test_residual_block_infer(benchmark: Any, x: Tensor, backend: str) -> None:
    _group(benchmark, "residual_block infer", x)
    block = _block(x, backend).eval()
    with torch.no_grad():
        benchmark.pedantic(block, (x,), **ROUNDS)
