"""Evaluation against the fp64 reference: the whole block as a chain on the chip, and in phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import Case, bottleneck
from support.emulated_blocks import block, eightfold
from support.emulated_checks import FEW, LARGE, MODES, Checks, modes
from support.matrix import HALVES, family
from support.random_blocks import cases


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_evaluation_on_the_chip(skip: str, order: str, dtype: torch.dtype, check: Checks) -> None:
    """One launch; the projection and the stride in the middle included."""
    for channels, width in ((24, 8), (40, 16)):
        case = bottleneck(skip, order, bias=True, channels=channels, width=width, branch_scale="[C]", size=(17, 14))
        launched = check.evaluates(case, "single", dtype)
        chain = "chain with projection" if skip == "projection" else "chain"
        # the norm before the first convolution is not folded: its table is written first
        assert launched.startswith(f"2 cooperative: table | {chain}" if order == "pre" else f"2: {chain}")


@modes
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_evaluation_in_phases(skip: str, order: str, dtype: torch.dtype, mode: str, check: Checks) -> None:
    case = bottleneck(skip, order, bias=True, branch_scale="[C]")
    launched = check.evaluates(case, mode, dtype, device=LARGE)
    assert "chain" not in launched
    count = 3 + (skip == "projection") + (order == "pre")
    assert launched.count("\n") == (0 if mode == "single" else count - 1)
    assert launched.count("convolution") == 3 + (skip == "projection")


@pytest.mark.parametrize("size", [7, 9, 14, 17])
def test_evaluation_at_the_edges_of_tiles(size: int, check: Checks) -> None:
    """With several workers, and none: BasicBlocks whose tiles' halos reach into each other's pictures."""
    for skip, workers in (("identity", 1), ("projection", 3)):
        case = block(2, skip, channels=8, width=8, size=(size, 23 - size), bias=True, skip_scale="0-d")  # type: ignore[arg-type]
        assert "chain" in check.evaluates(case, dtype=torch.bfloat16, device=(2, workers))


@pytest.mark.parametrize(("channels", "width"), [(8, 16), (72, 24), (24, 72), (136, 40)])
def test_evaluation_of_other_widths(channels: int, width: int, check: Checks) -> None:
    """More columns than a tile's."""
    case = bottleneck("identity", channels=channels, width=width, size=(9, 9), batch=1)
    for dtype in (torch.float32, torch.bfloat16):
        assert "chain" in check.evaluates(case, dtype=dtype, seeds=FEW)


def test_evaluation_that_does_not_fit_the_chip(check: Checks) -> None:
    """What lies between the convolutions of float32 is twice as large."""
    case = bottleneck("identity", channels=24, width=72, size=(16, 16), batch=1)
    assert "chain" in check.evaluates(case, dtype=torch.bfloat16, seeds=FEW, shared_memory=90)
    assert "chain" not in check.evaluates(case, seeds=FEW, shared_memory=90)


@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2), ((1, 2), (2, 1)), (3, 2)])
def test_evaluation_with_stride_and_dilation(stride: Any, dilation: Any, check: Checks) -> None:
    case = block(2, "projection", stride=stride, dilation=dilation, channels=8, width=8, size=(17, 15))
    assert "chain with projection" in check.evaluates(case)
    assert "chain with projection" in check.evaluates(case, dtype=torch.float16)
    assert "chain" not in check.evaluates(case, device=LARGE)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_evaluation_of_short_chains(stages: int, check: Checks) -> None:
    for skip in ("none", "identity", "projection"):
        case = block(stages, skip, skip_scale="one" if skip == "none" else "0-d", size=(9, 8))  # type: ignore[arg-type]
        assert ("chain" in check.evaluates(case)) == (stages > 1)


def test_evaluation_without_norms_and_activations(check: Checks) -> None:
    for order in ("post", "pre"):
        for act in ("relu", "identity"):
            check.evaluates(block(2, order=order, act=act, norm=False, skip_scale="[C]", size=(9, 8)))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("library", ["spatial", "all"])
def test_evaluation_with_library_convolutions(library: str, order: str, check: Checks) -> None:
    for skip in ("none", "identity", "projection"):
        case = block(2, skip, order=order, bias=True)  # type: ignore[arg-type]
        assert "chain" not in check.evaluates(case, "single" if skip == "none" else "phased", library=library)


@settings(family, max_examples=30)
@given(
    case=st.one_of(cases(), cases(channels=(1, 2, 3)).map(eightfold)),
    mode=st.sampled_from(MODES),
    device=st.sampled_from([(1, 1), (2, 3), (64, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float32, *HALVES]),
)
def test_any_block_in_evaluation(
    case: Case, mode: str, device: tuple[int, int], dtype: torch.dtype, check: Checks
) -> None:
    check.evaluates(case, mode, dtype, device=device)
