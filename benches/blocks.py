"""Single blocks of ResNet-50 at their real shapes, eager against the native operators, under pytest-benchmark.

    pytest benches/blocks.py --benchmark-columns=median,iqr,rounds --benchmark-json=blocks.json

Each group holds one block, phase and dtype; the figure in brackets is the ratio to the faster of the two.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import fuse, models

BATCH = 4
INPUTS = {  # name in ResNet-50: channels, height and width of its input
    "layer1.1": (256, 56),
    "layer2.0": (256, 56),
    "layer3.1": (1024, 14),
    "layer4.1": (2048, 7),
}
ROUNDS = {"rounds": 10, "warmup_rounds": 2}


@pytest.fixture(params=INPUTS)
def block_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["eager", "fused"])
def block(request: pytest.FixtureRequest, block_name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    original = models.resnet50(fused=False).get_submodule(block_name)
    module = copy.deepcopy(original).to(dtype, memory_format=torch.channels_last)
    return fuse(module, backend="native") if request.param == "fused" else module


@pytest.fixture
def x(block_name: str, dtype: torch.dtype) -> Tensor:
    channels, size = INPUTS[block_name]
    noise = torch.randn(BATCH, channels, size, size).relu()  # a block's input has passed a ReLU
    return noise.to(dtype, memory_format=torch.channels_last).requires_grad_()


def _group(benchmark: Any, phase: str, block_name: str, dtype: torch.dtype) -> None:
    benchmark.group = f"{block_name} {phase} {str(dtype).removeprefix('torch.')}"


def test_forward(benchmark: Any, block: nn.Module, x: Tensor, block_name: str, dtype: torch.dtype) -> None:
    _group(benchmark, "training forward", block_name, dtype)
    benchmark.pedantic(block, (x,), **ROUNDS)


def test_backward(benchmark: Any, block: nn.Module, x: Tensor, block_name: str, dtype: torch.dtype) -> None:
    _group(benchmark, "backward", block_name, dtype)
    leaves = (x, *block.parameters())

    def forward() -> tuple[tuple[Tensor, tuple[Tensor, ...], Tensor], dict[str, Any]]:
        out = block(x)
        return (out, leaves, torch.ones_like(out)), {}

    benchmark.pedantic(torch.autograd.grad, setup=forward, **ROUNDS)


def test_evaluation(benchmark: Any, block: nn.Module, x: Tensor, block_name: str, dtype: torch.dtype) -> None:
    _group(benchmark, "evaluation", block_name, dtype)
    block.eval()
    with torch.no_grad():
        benchmark.pedantic(block, (x,), **ROUNDS)
