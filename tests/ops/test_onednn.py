"""Convolutions that oneDNN 3.12 gets wrong, alone or in PyTorch's wrapping, and that we run in another form."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.blocks import Case, block
from support.equivalence import relative_error
from support.named_tensors import leaves, named_tensors, to_double
from torch import Tensor

from resnet_fused import functional
from resnet_fused.spec import BlockSpec, IntPair, Skip, StageSpec

M_PERTURB = -6  # of glibc: new memory is filled with the complement of a byte
HALVES = [torch.bfloat16, torch.float16]


@contextmanager
def memory_filled_with(byte: int) -> Iterator[None]:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_PERTURB, byte ^ 0xFF)
    try:
        yield
    finally:
        libc.mallopt(M_PERTURB, 0)


def convolution(
    channels: int,
    width: int,
    size: IntPair,
    kernel: IntPair,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair = (1, 1),
    groups: int = 1,
    batch: int = 2,
) -> Case:
    """A block of one convolution."""
    stage = StageSpec(stride, padding, dilation, groups, norm=False, act="identity")
    return Case(BlockSpec((stage,)), channels, (width,), (kernel,), size, batch)


# What they have in common: the stride reaches beyond a row, or a row gives one value.
UNINITIALISED = {
    "weight gradient": convolution(8, 8, (5, 1), (2, 2), (2, 2), (1, 1)),
    "weight gradient, rows of two": convolution(8, 8, (5, 2), (5, 3), (2, 3), (2, 1)),
    "weight gradient, two windows": convolution(4, 3, (8, 1), (2, 3), (1, 2), (0, 2), batch=1),
    "weight gradient, groups": convolution(16, 32, (8, 2), (3, 3), (3, 3), (1, 1), groups=4, batch=3),
    "one channel": convolution(1, 1, (12, 3), (1, 3), (1, 3), (0, 1), batch=5),
    "one channel, more filters": convolution(1, 32, (6, 1), (3, 3), (1, 2), (1, 1), batch=3),
    "one channel per group": convolution(4, 12, (8, 1), (2, 3), (1, 2), (0, 1), groups=4, batch=1),
    "one channel per group, no padding": convolution(2, 8, (12, 5), (3, 5), (1, 2), (2, 0), (2, 1), groups=2, batch=1),
    "cropped": convolution(1, 3, (8, 4), (5, 2), (1, 3), (2, 0), batch=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", UNINITIALISED)
def test_nothing_uninitialised_is_read(name: str, dtype: torch.dtype) -> None:
    """The same bits whatever new memory holds, and the right ones."""
    case = UNINITIALISED[name]
    given, params, spec = case.build(dtype, torch.channels_last)
    # of one channel, with the strides that our own passes leave: `contiguous` would take it as it is
    x = torch.empty(given.shape, dtype=dtype, memory_format=torch.channels_last).copy_(given)
    dout = case.upstream(dtype)

    def compute() -> list[Tensor]:
        tensors = leaves(params)
        weight = tensors.stages[0].weight
        leaf = x.detach().requires_grad_()
        out = functional.residual_block(leaf, tensors, spec, backend="native")
        return [out.detach(), *torch.autograd.grad(out, [leaf, weight], dout)]

    found = []
    for byte in (0x7F, 0xBE, 0x41):  # of either sign, from huge to of our values' size
        with memory_filled_with(byte):
            found.append(compute())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    x64, w64 = x.double().requires_grad_(), params.stages[0].weight.detach().double().requires_grad_()
    (stage,) = spec.stages
    out = torch.nn.functional.conv2d(x64, w64, None, *stage.geometry, stage.groups)
    for got, exact in zip(found[0], [out, *torch.autograd.grad(out, [x64, w64], dout.double())], strict=True):
        assert relative_error(got, exact) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_gradient_of_a_strided_1x1(dtype: torch.dtype) -> None:
    """Out of bounds is written there, on two threads, where the channels are no multiples of 16."""
    for channels, width in ((8, 1), (8, 8), (3, 16), (12, 24), (5, 6)):
        for stride in ((2, 2), (3, 3), (1, 2)):
            case = convolution(channels, width, (14, 12), (1, 1), stride, (0, 0), batch=5)
            for seed in range(4):
                x, params, spec = case.build(dtype, torch.channels_last, seed)
                tensors, dout = leaves(params), case.upstream(dtype, seed)
                weight = tensors.stages[0].weight
                (got,) = torch.autograd.grad(
                    functional.residual_block(x, tensors, spec, backend="native"), weight, dout
                )
                kept = x[:, :, :: stride[0], :: stride[1]].double()
                exact = torch.einsum("nkhw,nchw->kc", dout.double(), kept)[..., None, None]
                assert relative_error(got, exact) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_dilation_of_a_single_tap_means_nothing(dtype: torch.dtype, training: bool) -> None:
    """PyTorch crashes here in bfloat16, on many a call."""
    for size, kernel, stride, padding, dilation, groups in [
        ((5, 1), (5, 1), (1, 2), (1, 1), (1, 2), 1),
        ((12, 1), (3, 1), (3, 3), (1, 2), (1, 2), 1),
        ((4, 1), (1, 1), (2, 2), (1, 1), (1, 2), 4),
        ((1, 4), (1, 3), (2, 2), (1, 1), (2, 1), 1),
    ]:
        dilated = convolution(4, 8, size, kernel, stride, padding, dilation, groups)
        plain = convolution(4, 8, size, kernel, stride, padding, (1, 1), groups)
        assert dilated.sizes == plain.sizes

        def compute(case: Case, dtype: torch.dtype = dtype) -> list[Tensor]:
            x, params, spec = case.build(dtype, torch.channels_last)
            if not training:
                with torch.no_grad():
                    return [functional.residual_block(x, params, spec, backend="native")]
            tensors, leaf = leaves(params), x.requires_grad_()
            out = functional.residual_block(leaf, tensors, spec, backend="native")
            weight = named_tensors(tensors)["stages.0.weight"]
            return [out.detach(), *torch.autograd.grad(out, [leaf, weight], case.upstream(dtype))]

        for got, expected in zip(compute(dilated), compute(plain), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("skip", ["identity", "projection"])
@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_evaluation_of_a_grouped_last_convolution(dtype: torch.dtype, groups: int, act: str, skip: Skip) -> None:
    """PyTorch's fused sum of one asserts in 16 bits where it must keep the other addend and has a ReLU."""
    case = block(2, skip, channels=8, width=8, groups=groups, act=act, batch_stats=False)
    x, params, spec = case.build(dtype, torch.channels_last)
    with torch.no_grad():
        got = functional.residual_block(x, params, spec, backend="native")
        exact = functional.residual_block(x.double(), to_double(params), spec, backend="eager")
    assert relative_error(got, exact) < (1e-5 if dtype == torch.float32 else 2e-2)
