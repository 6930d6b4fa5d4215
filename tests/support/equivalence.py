"""The one tolerance of the tests: no further from the exact result than twice PyTorch's own error.

`exact` is an fp64 run, `eager` PyTorch's own run in the dtype under test. The error is the largest absolute
difference relative to the largest exact value. The floor of a few ulp is for the cases in which eager happens to be
exact, or nearly so. `assert_runs_as_accurate` holds whole runs against each other, with what kinks may do.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOOR_ULPS = 4
# `make soak` draws tens of thousands of small blocks, of which one in some thousands is beyond the tolerance by chance.
# A wrong formula is so by a factor of thousands.
CHANCE = 16 if "RESNET_FUSED_SOAK" in os.environ else 1
Results = dict[str, Tensor | None]


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
    allowed = CHANCE * max(factor * eager_error, FLOOR_ULPS * torch.finfo(eager.dtype).eps)
    assert error <= allowed, f"{name}: error {error:.3g} against fp64, eager's is {eager_error:.3g}"  # false for NaN


def assert_runs_as_accurate(results: dict[str, Results], dtype: torch.dtype, flips: bool) -> None:
    """`assert_as_accurate` for every result of "got", with the largest error of three as eager's.

    results: `pooled` runs in `dtype`: "got", "exact" (fp64) and PyTorch's own: "eager" in the given memory format,
             "other" in the other one, and "flipped", what masks that rounding may flip do to the
             exact run (`kinks`), which counts for gradients where there are `flips`.
    """
    got, eager, exact = results["got"], results["eager"], results["exact"]
    assert got.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        if value is None or not value.is_floating_point():
            assert_as_accurate(name, got[name], eager[name], value)
            continue
        by_flips = flips and name.startswith("grad")
        # in 16 bits masks flip and derivatives round in either run; the largest error is chance, the mean square is not
        error = root_mean_square_error if by_flips and dtype.itemsize == 2 else relative_error
        peers = [results[kind][name] for kind in ("eager", "other", "flipped")[: 2 + by_flips]]
        worst = max((t for t in peers if t is not None), key=lambda t: error(t, value))
        ours = got[name]
        assert ours is not None and ours.shape == value.shape, name
        assert eager[name] is not None and ours.dtype == eager[name].dtype, name  # type: ignore[union-attr]
        allowed = CHANCE * max(2 * error(worst, value), FLOOR_ULPS * torch.finfo(ours.dtype).eps)
        reached = error(ours, value)
        assert reached <= allowed, f"{name}: error {reached:.3g} against fp64, eager's is {error(worst, value):.3g}"


def pooled(runs: list[Results]) -> Results:
    """Each result stacked over the runs."""
    return {name: None if t is None else torch.stack([r[name] for r in runs]) for name, t in runs[0].items()}  # type: ignore[misc]


def root_mean_square_error(value: Tensor, exact: Tensor) -> float:
    """Relative to the root mean square of `exact`."""
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))
