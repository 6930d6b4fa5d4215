"""The same call gives the same bits: partial sums are added in a fixed order, whatever the threads do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import engine_runs
from support.block_equivalence import assert_equivalent
from support.blocks import block
from support.matrix import BACKENDS, FORMATS
from support.runs import run

from resnet_fused import functional

backends = pytest.mark.parametrize("backend", BACKENDS)

CASES = {
    "post": block(3, "projection", channels=16, width=8, out_channels=32, stride=2, size=(33, 29), batch=3, bias=True),
    "pre": block(3, order="pre", channels=16, width=8, size=(33, 29), batch=3, branch_scale="[C]", skip_scale="0-d"),
    "depthwise": block(2, channels=12, width=12, groups=12, size=(33, 29)),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    try:
        yield request.param
    finally:
        torch.set_num_threads(before)


@backends
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", CASES)
def test_bitwise_repeatable(
    name: str, memory: str, dtype: torch.dtype, memory_format: torch.memory_format, backend: str
) -> None:
    """Output, every gradient and every running statistic."""
    x, params, spec = CASES[name].build(dtype, memory_format)
    spec = spec.with_memory(memory)  # type: ignore[arg-type]
    first, *others = (run(x, params, spec, backend, CASES[name].upstream(dtype)) for _ in range(4))
    for other in others:
        for result, value in first.items():
            assert torch.equal(value, other[result]), result  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_which_thread_helps(dtype: torch.dtype) -> None:
    """Of more threads than cores some always wait, and others take their jobs."""
    case = block(3, "projection", channels=64, width=64, out_channels=128, size=(28, 31), batch=16)
    x, params, spec = case.build(dtype, torch.channels_last)
    with engine_runs.threads(7):
        first, *others = (run(x, params, spec, "native", case.upstream(dtype)) for _ in range(8))
    for other in others:
        for result, value in first.items():
            assert torch.equal(value, other[result]), result  # type: ignore[arg-type]


@backends
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_is_bitwise_repeatable(dtype: torch.dtype, backend: str) -> None:
    case = block(3, "projection", channels=16, width=8, out_channels=32, stride=2, size=(33, 29), batch_stats=False)
    first, *others = (run(*case.build(dtype, torch.channels_last), backend)["out"] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)  # type: ignore[arg-type]


@backends
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_two_threads_are_as_exact_as_eager(name: str, dtype: torch.dtype, backend: str) -> None:
    """Most other tests run on one, where several test workers share the cores."""
    case = CASES[name]
    blocks = [case.build(dtype, torch.channels_last, seed) for seed in range(2)]
    assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in range(2)], backend)


@backends
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_pooling_gives_the_same_bits_on_two_threads(memory_format: torch.memory_format, backend: str) -> None:
    x = torch.randn(3, 40, 61, 67).contiguous(memory_format=memory_format)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        out = functional.max_pool2d(leaf, 3, 2, 1, backend=backend)
        out.square().sum().backward()
        found.append((out, leaf.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))  # type: ignore[arg-type]


@backends
def test_memory_modes_agree_bitwise_on_the_output(backend: str) -> None:
    """memory="low" changes what is kept, not what is computed forward."""
    for case in CASES.values():
        x, params, spec = case.build(torch.float32, torch.channels_last)
        low = run(x, params, spec.with_memory("low"), backend)["out"]
        assert torch.equal(low, run(x, params, spec, backend)["out"])  # type: ignore[arg-type]
