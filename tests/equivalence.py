"""The one tolerance of the tests: no further from the exact result than twice PyTorch's own error.

`exact` is an fp64 run, `eager` PyTorch's own run in the dtype under test. The error is the largest absolute
difference relative to the largest exact value. The floor of a few ulp is for the cases in which eager happens to be
exact, or nearly so.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR_ULPS = 4


def relative_error(value: Tensor, exact: Tensor) -> float:
    """max|value - exact| / max|exact|; absolute where `exact` is all zero, 0 for empty tensors, NaN stays NaN."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.detach().double()
    error = (value.detach().double() - exact).abs().max()
    size = exact.abs().max()
    return float(error / size if size > 0 else error)


def assert_as_accurate(
    name: str, got: Tensor | None, eager: Tensor | None, exact: Tensor | None, factor: float = 2
) -> None:
    """`got` has eager's shape and dtype and at most `factor` times eager's error; all three may be None together.

    The floor is in ulp of the coarsest dtype at work: `torch.finfo(eager.dtype).eps`.
    """
    if got is None or eager is None or exact is None:
        assert got is None and eager is None and exact is None, f"{name}: only some of the three are None"
        return
    assert got.shape == eager.shape == exact.shape, f"{name}: {got.shape}, {eager.shape}, {exact.shape}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype} instead of eager's {eager.dtype}"
    if not eager.dtype.is_floating_point:
        assert torch.equal(got, eager), f"{name}: {got} instead of eager's {eager}"
        return
    error, eager_error = relative_error(got, exact), relative_error(eager, exact)
    allowed = max(factor * eager_error, FLOOR_ULPS * torch.finfo(eager.dtype).eps)
    assert error <= allowed, f"{name}: error {error:.3g} against fp64, eager's is {eager_error:.3g}"  # false for NaN
