"""Weight gradients by the engine: csrc/cpu/engine/weight_gradient.h."""

from __future__ import annotations

import math

import pytest
import torch
from support.engine_runs import in_process, threads
from support.weight_gradients import (
    CASES,
    THREADS,
    Convolution,
    assert_accurate,
    assert_exact,
    by_engine,
    eager,
    exact,
    fused,
    tensors,
)

LAST = -1


def has_tiles() -> bool:
    return by_engine(CASES["3x3"])


@pytest.mark.parametrize("isa", ["amx", "amx_portable", "avx512_bf16"])
def test_every_case_in_every_instruction_set(isa: str) -> None:
    done = in_process(isa, ["-m", "support.weight_gradients"])
    if "accepted on this processor" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.stdout.strip() == "all", done.stderr[-4000:]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_as_exact_as_eager(name: str) -> None:
    assert_accurate(CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_sums_of_small_integers_are_exact(name: str) -> None:
    if not has_tiles():
        pytest.skip("this machine has no AMX, and eager's sums, which run instead, may be rounded to bfloat16")
    assert_exact(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_large_ones_run_unforced(name: str) -> None:
    if not has_tiles():
        pytest.skip("this machine has no AMX")
    assert by_engine(CASES[name])


@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 1)], ids=str)
def test_each_tap_reads_its_own_pixel(stride: tuple[int, int]) -> None:
    """One value of dy and one of x, which meet in one tap or in none."""
    case = Convolution((64, 32), (5, 4), stride=stride, batch=2)
    x, weight, dy = (torch.zeros_like(t) for t in tensors(case))
    dy[1, 3, 1, 1] = 1
    for row in range(5):
        for column in range(4):
            x.zero_()
            x[1, 40, row, column] = 1
            expected = torch.zeros_like(weight)
            tap = (row - stride[0] + 1, column - stride[1] + 1)
            if tap[0] in range(3) and tap[1] in range(3):
                expected[3, 40, tap[0], tap[1]] = 1
            assert torch.equal(fused(case, x, weight, dy), expected), (row, column)


@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("channels", [(64, 32), (192, 192)], ids=["apart", "shared"])
def test_the_sums_of_every_thread_count(channels: tuple[int, int], count: int) -> None:
    """Image n alone gives input channel n its gradient."""
    case = Convolution(channels, (4, 3), batch=23)
    x, weight, dy = (torch.zeros_like(t) for t in tensors(case))
    dy[:, 5] = 1
    for n in range(case.batch):
        x[n, n] = 1
    with threads(count):
        got = fused(case, x, weight, dy)
    assert torch.equal(got[5, : case.batch, 1, 1], torch.full((case.batch,), 12.0).bfloat16())
    assert got.count_nonzero() == case.batch * 9


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_last_channels_and_pixels_count(kernel: int) -> None:
    case = Convolution((37, 83), (7, 9), (kernel, kernel), padding=(kernel // 2, kernel // 2), batch=3)
    x, weight, dy = (torch.zeros_like(t) for t in tensors(case))
    x[LAST, LAST, LAST, LAST] = 3
    dy[LAST, LAST, LAST, LAST] = 5
    expected = torch.zeros_like(weight)
    expected[LAST, LAST, kernel // 2, kernel // 2] = 15
    assert torch.equal(fused(case, x, weight, dy), expected)


@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_again(name: str, count: int) -> None:
    given = tensors(CASES[name])
    with threads(count):
        first = fused(CASES[name], *given)
        assert torch.equal(first, fused(CASES[name], *given))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("name", ["3x3", "1x1", "1x1, stride 2", "3x3, stride 2", "outputs shared", "groups"])
def test_what_is_not_finite_reaches_what_depends_on_it(name: str, where: str, value: float) -> None:
    """And nothing else, unless eager lets it, which computes where a zero of the padding might meet it."""
    case = CASES[name]
    x, weight, dy = tensors(case)
    given = {"x": x, "dy": dy}
    given[where][0, 0, 0, 0] = value
    got = fused(case, weight=weight, **given)
    ones = {key: t.isfinite().logical_not() if key == where else torch.ones_like(t) for key, t in given.items()}
    reached = exact(case, weight=weight, **{key: t.float() for key, t in ones.items()}) > 0
    assert not got[reached].isfinite().any()
    assert got[~reached & eager(case, weight=weight, **given).isfinite()].isfinite().all()
