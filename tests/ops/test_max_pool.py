"""max_pool2d against F.max_pool2d: equal bits, since a maximum is not rounded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.matrix import BACKENDS, FORMATS, LOW_PRECISION, family
from torch import Tensor

from resnet_fused import functional
from resnet_fused.errors import BackendError

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


def both(
    x: Tensor, window: tuple[int, int, int], backend: str, dout: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(output, gradient of x) of PyTorch and of the backend; the upstream gradient is 1, 2, 3, ..."""
    results = []
    for compute in (F.max_pool2d, lambda x, *w: functional.max_pool2d(x, *w, backend=backend)):
        leaf = x.detach().requires_grad_()
        out = compute(leaf, *window)
        if dout is None:
            dout = (torch.arange(out.numel()) % 61 + 1).reshape(out.shape).to(x.dtype)
        (grad,) = torch.autograd.grad(out, leaf, dout)
        results.append((out.detach(), grad))
    return results[0], results[1]


def assert_same(x: Tensor, window: tuple[int, int, int], backend: str, dout: Tensor | None = None) -> None:
    (expected, expected_grad), (out, grad) = both(x, window, backend, dout)
    assert out.dtype == expected.dtype and grad.dtype == expected_grad.dtype
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(grad, expected_grad)
    for memory_format in FORMATS:
        assert out.is_contiguous(memory_format=memory_format) == expected.is_contiguous(memory_format=memory_format)


@backends
@dtypes
@formats
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 64])
@pytest.mark.parametrize("size", [(9, 13), (4, 4), (31, 2)])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (1, 1, 0)])
def test_random(
    window: tuple[int, int, int],
    size: tuple[int, int],
    channels: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    backend: str,
) -> None:
    torch.manual_seed(0)
    assert_same(torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=memory_format), window, backend)


@backends
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 17), st.integers(1, 17)),
    kernel=st.integers(1, 15),
    stride=st.integers(1, 6),
    padding=st.integers(0, 7),
    levels=st.integers(1, 4),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float64, *LOW_PRECISION]),
)
@family
def test_any_window_with_ties(
    shape: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: int,
    levels: int,
    last: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Few different values, so that most windows hold their maximum several times: the first receives the gradient."""
    padding = min(padding, kernel // 2)
    kernel = min(kernel, min(shape[2:]) + 2 * padding)
    padding = min(padding, kernel // 2)
    generator = torch.Generator().manual_seed(kernel + 16 * stride)
    x = torch.randint(-levels, 1, shape, generator=generator).to(dtype)
    # whole numbers small enough that the sums of gradients are exact in every dtype
    out = F.max_pool2d(x, kernel, stride, padding)
    dout = torch.randint(0, 2, out.shape, generator=generator).to(dtype)
    assert_same(x.contiguous(memory_format=FORMATS[last]), (kernel, stride, padding), backend, dout)


@backends
@dtypes
@formats
def test_nan_and_infinities(memory_format: torch.memory_format, dtype: torch.dtype, backend: str) -> None:
    """NaN wins its windows, also the first of two; -inf is a value like others, and padding never wins."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 9, 11).to(dtype)
    x[0, :2, 3, 4] = x[0, 1, 3, 5] = x[1, 0, 0, 0] = x[1, 4, 8, 10] = torch.nan
    x[0, 3] = -torch.inf
    x[1, 2, :4] = -torch.inf
    x[1, 3, 4, 4] = torch.inf
    assert_same(x.contiguous(memory_format=memory_format), (3, 2, 1), backend)


@backends
@dtypes
def test_signed_zeros(dtype: torch.dtype, backend: str) -> None:
    """-0.0 and 0.0 tie."""
    x = torch.tensor([-0.0, 0.0, 0.0, -0.0]).to(dtype).reshape(1, 1, 2, 2).repeat(1, 9, 1, 1)
    (expected, grad), (out, our_grad) = both(x, (2, 2, 0), backend)
    assert torch.equal(out.signbit(), expected.signbit()) and torch.equal(grad, our_grad)


@backends
@dtypes
def test_strided(dtype: torch.dtype, backend: str) -> None:
    """x and the gradient from above as windows of wider tensors, or expanded."""
    torch.manual_seed(2)
    wide = torch.randn(3, 9, 12, 22).to(dtype)
    x = wide[1:, 2:7, 1:10, ::2]
    shape = F.max_pool2d(x, 3, 2, 1).shape
    for dout in (torch.ones((), dtype=dtype).expand(shape), torch.ones(*shape[::-1], dtype=dtype).permute(3, 2, 1, 0)):
        (expected, expected_grad), (out, grad) = both(x, (3, 2, 1), backend, dout)
        assert torch.equal(out, expected) and torch.equal(grad, expected_grad)


@backends
def test_overlapping_windows_add_up(backend: str) -> None:
    """One large value in four windows of 3x3 stride 2 receives four gradients, in fp32 and rounded once in bf16."""
    x = torch.zeros(1, 8, 5, 5)
    x[:, :, 1, 1] = 9.0
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.to(dtype).requires_grad_()
        out = functional.max_pool2d(leaf, 3, 2, 1, backend=backend)
        (grad,) = torch.autograd.grad(out, leaf, torch.full_like(out, 1 + 2**-7))
        exact = (out == 9.0).sum((2, 3)) * (1 + 2**-7)
        assert torch.equal(grad[:, :, 1, 1], exact.to(dtype))


@backends
def test_gradient_check(backend: str) -> None:
    x = torch.randperm(2 * 2 * 5 * 6).reshape(2, 2, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: functional.max_pool2d(x, 3, 2, 1, backend=backend), x)


@backends
def test_second_derivative_says_what_to_do(backend: str) -> None:
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        functional.max_pool2d(x, 3, 2, 1, backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"no second derivative of max_pool2d.*backend='eager'"):
        torch.autograd.grad(grad.sum(), x)


@backends
def test_no_graph_without_gradient(backend: str) -> None:
    assert functional.max_pool2d(torch.randn(1, 2, 6, 6), 3, 2, 1, backend=backend).grad_fn is None


def test_empty_batch() -> None:
    assert functional.max_pool2d(torch.randn(0, 3, 6, 6), 3, 2, 1).shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    ("x", "window", "error", "words"),
    [
        (torch.randn(3, 6, 6), (3, 2, 1), ValueError, r"4-d.*3-d"),
        (torch.ones(1, 3, 6, 6, dtype=torch.int64), (3, 2, 1), TypeError, r"int64.*float32"),
        (torch.randn(1, 3, 6, 6), (0, 2, 1), ValueError, r"kernel_size=0.*1 to 15"),
        (torch.randn(1, 3, 20, 20), (16, 2, 1), ValueError, r"kernel_size=16.*1 to 15"),
        (torch.randn(1, 3, 6, 6), (3, 0, 1), ValueError, r"stride=0.*positive"),
        (torch.randn(1, 3, 6, 6), (3, 2, 2), ValueError, r"padding=2.*half the kernel"),
        (torch.randn(1, 3, 6, 6), (3, 2, -1), ValueError, r"padding=-1"),
        (torch.randn(1, 3, 2, 6), (3, 2, 0), ValueError, r"3x3.*\(1, 3, 2, 6\)"),
    ],
)
def test_bad_calls(x: Tensor, window: tuple[int, int, int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        functional.max_pool2d(x, *window)


def test_backend_that_cannot() -> None:
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(BackendError, match="triton"):
        functional.max_pool2d(x, 3, 2, 1, backend="triton")
    with pytest.raises(ValueError, match=r"'nothing'.*'native'"):
        functional.max_pool2d(x, 3, 2, 1, backend="nothing")
    with pytest.raises(BackendError, match=r"native.*meta"):  # asked for by name: no silent fallback
        functional.max_pool2d(x.to("meta"), 3, 2, 1, backend="native")
