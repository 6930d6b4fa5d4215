"""Depthwise gradients with kernels of their own: csrc/cpu/depthwise.h."""

from __future__ import annotations

import math

import pytest
import torch
from support.depthwise import (
    CASES,
    Depthwise,
    assert_gradients,
    eager,
    fused,
    gradients,
    output_gradient,
    tensors,
)
from support.engine_runs import in_process

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    assert_gradients(CASES[name], dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    done = in_process(isa, ["-c", "from support.depthwise import assert_all; assert_all(); print('all')"])
    if "accepted on this processor" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.stdout.strip() == "all", done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bands", "many images"])
@pytest.mark.usefixtures("two_threads")
def test_the_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, weight = tensors(case, dtype)
    dy = output_gradient(case, x, weight)
    two = gradients(fused, case, x, weight, dy)
    torch.set_num_threads(1)
    one = gradients(fused, case, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_sums_of_many_pixels_keep_their_digits() -> None:
    """Of values around 1, whose sums float32 would add with an error of 1e-4 one by one."""
    case = Depthwise(16, (200, 200), (5, 5), padding=(2, 2), batch=1)
    x, weight = tensors(case, torch.float32)
    x, dy = 1 + x / 64, torch.ones_like(x)
    _, got = gradients(fused, case, x, weight, dy)
    _, exact = gradients(eager, case, x.double(), weight.double(), dy.double())
    assert float((got - exact).abs().max() / exact.abs().max()) < 1e-6


SPECIAL = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_what_depends_on_it(dtype: torch.dtype, where: str, value: float) -> None:
    """And nothing by the zeros of the padding, unless eager lets it: oneDNN's bfloat16 weight gradient does."""
    case = Depthwise(20, (9, 8), (5, 5), (2, 2), (2, 2))
    x, weight = tensors(case, dtype)
    given = {"x": x, "weight": weight, "dy": output_gradient(case, x, weight)}
    given[where][0, 0, 0, 0] = value
    # how many products with the value each result has
    ones = {name: torch.ones_like(t, dtype=torch.float64) for name, t in given.items()}
    products = gradients(eager, case, **ones | {where: given[where].isfinite().logical_not().double()})
    results = zip(("x", "weight"), gradients(fused, case, **given), gradients(eager, case, **given), strict=True)
    for (name, ours, theirs), count in zip(results, products, strict=True):
        reached = torch.zeros_like(count, dtype=torch.bool) if name == where else count > 0
        assert not ours[reached].isfinite().any(), name
        assert ours[~reached & theirs.isfinite()].isfinite().all(), name
