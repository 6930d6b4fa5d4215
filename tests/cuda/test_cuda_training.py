"""Training by the CUDA kernels, run thread by thread on a CPU (tests/emulator), against the fp64 reference."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.block_equivalence import assert_equivalent
from support.blocks import Case, bottleneck
from support.eager_crashes import eager_may_crash
from support.emulated_blocks import block, eightfold
from support.emulated_checks import FEW, LARGE, MODES, SEEDS, Checks, devices, modes
from support.equivalence import relative_error
from support.matrix import FORMATS, HALVES, family
from support.operator_arguments import every_gradient
from support.random_blocks import cases
from torch import nn

import resnet_fused
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.ops import autograd
from resnet_fused.params import map_tensors


@modes
@devices
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_bottleneck(skip: str, order: str, device: tuple[int, int], mode: str, check: Checks) -> None:
    check.trains(bottleneck(skip, order), mode, memory_format=FORMATS[mode == "single"], device=device)


@modes
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["identity", "projection"])
def test_in_16_bits(skip: str, order: str, dtype: torch.dtype, mode: str, check: Checks) -> None:
    check.trains(bottleneck(skip, order), mode, dtype)
    check.trains(bottleneck(skip, order), mode, dtype, device=LARGE, norm_dtype=torch.float32)


# From here on one mode a case, turn about: the modes share every phase, and the tests above have shown the barriers.


@devices
@pytest.mark.parametrize(
    ("order", "act", "mode"),
    [
        ("post", "relu", "single"),
        ("post", "identity", "phased"),
        ("pre", "relu", "phased"),
        ("pre", "identity", "single"),
    ],
)
def test_recomputed_outputs(order: str, act: str, mode: str, device: tuple[int, int], check: Checks) -> None:
    check.trains(bottleneck("projection", order, act, "low"), mode, device=device)
    check.trains(bottleneck("identity", order, act, "low", branch_scale="[C]", channels=24), mode, torch.bfloat16)
    of_two = block(2, "projection", order=order, act=act, memory="low", stride=2, strides_at=1)  # type: ignore[arg-type]
    check.trains(of_two, mode, device=device)


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize(
    ("skip", "scale", "mode"),
    [
        ("none", "[C]", "single"),
        ("none", "0-d", "phased"),
        ("identity", "float", "phased"),
        ("identity", "[C]", "single"),
        ("projection", "0-d", "single"),
        ("projection", "[C,1,1]", "phased"),
    ],
)
def test_scales(skip: str, scale: str, mode: str, order: str, check: Checks) -> None:
    skip_scale = "one" if skip == "none" else scale
    case = bottleneck(skip, order, branch_scale=scale, skip_scale=skip_scale, bias=mode == "single")
    check.trains(case, mode, seeds=range(8))  # one number per block says little


@modes
@pytest.mark.parametrize("order", ["post", "pre"])
def test_biases_and_missing_vectors(order: str, mode: str, check: Checks) -> None:
    check.trains(bottleneck("projection", order, bias=True, affine=False, tracked=False), mode)
    check.trains(block(2, order=order, bias=True, channels=8, batch_stats=False, momentum=None), mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(("groups", "mode"), [(2, "single"), (4, "phased")])
def test_groups_are_left_to_the_library(groups: int, mode: str, check: Checks) -> None:
    check.trains(block(2, "identity", channels=4, width=4, groups=groups), mode)


@devices
@pytest.mark.parametrize(
    ("stride", "dilation", "mode"),
    [
        (1, 2, "single"),
        (2, 1, "phased"),
        (2, 2, "single"),
        (3, 2, "phased"),
        ((1, 2), (2, 3), "single"),
        ((2, 3), (3, 1), "phased"),
        ((4, 5), (1, 2), "single"),
    ],
)
def test_stride_and_dilation(stride: Any, dilation: Any, mode: str, device: tuple[int, int], check: Checks) -> None:
    """Strides beyond the kernel leave pixels of x that no tap reaches."""
    case = block(2, "projection", stride=stride, dilation=dilation, out_channels=16, size=(11, 10))
    if not any(map(eager_may_crash, case.spec.convs, case.kernels)):
        check.trains(case, mode, device=device)
    case = block(1, "none", stride=stride, dilation=dilation, channels=8, out_channels=8, size=(13, 12))
    check.trains(case, mode, torch.bfloat16, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "mode"), [(1, "phased"), (2, "single"), (5, "phased"), (7, "single")])
def test_stem_shaped(kernel: int, mode: str, dtype: torch.dtype, check: Checks) -> None:
    case = block(1, "none", kernel=kernel, channels=3, out_channels=18, stride=2, size=(15, 17))
    check.trains(case, mode, dtype, seeds=SEEDS if kernel < 5 else FEW)


@devices
@pytest.mark.parametrize(
    ("order", "batch_stats", "mode"),
    [
        ("post", False, "single"),
        ("post", (True, False), "phased"),
        ("pre", False, "phased"),
        ("pre", (False, True), "single"),
    ],
)
def test_running_statistics(
    order: str, batch_stats: bool | tuple[bool, bool], mode: str, device: tuple[int, int], check: Checks
) -> None:
    check.trains(block(2, "identity", order=order, batch_stats=batch_stats), mode, device=device)  # type: ignore[arg-type]


@devices
@pytest.mark.parametrize(("order", "mode"), [("post", "single"), ("pre", "phased")])
def test_without_norms(order: str, mode: str, device: tuple[int, int], check: Checks) -> None:
    for skip in ("none", "identity", "projection"):
        case = block(2, skip, order=order, norm=False, bias=True)  # type: ignore[arg-type]
        check.trains(case, mode, device=device)


@modes
@pytest.mark.parametrize("library", ["spatial", "all"])
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_library_convolutions(skip: str, order: str, library: str, mode: str, check: Checks) -> None:
    """Passes around the vendor's convolutions, in one launch between two of them or one each."""
    scales: Any = {} if skip == "none" else {"branch_scale": "[C]", "skip_scale": "0-d", "bias": True}
    check.trains(bottleneck(skip, order, **scales), mode, library=library)
    check.trains(bottleneck(skip, order, memory="low"), mode, torch.bfloat16, library=library)


@pytest.mark.parametrize("order", ["post", "pre"])
def test_mean_far_above_deviation(order: str, check: Checks) -> None:
    """As in test_equivalence.py: statistics and norms that cancel would have no digit left."""
    check.set()
    case = block(2, "none", order=order, size=(11, 9), kernel=1, act="identity")  # type: ignore[arg-type]
    blocks = []
    for seed in range(8):
        x, params, spec = case.build(torch.float32, torch.channels_last, seed)
        params = map_tensors(
            params, lambda n, t: t.abs() / t.abs().sum(1, keepdim=True) if n.endswith("0.weight") else t
        )
        blocks.append((1e3 + 0.1 * (x - x.mean()) / x.std(), params, spec))
    assert_equivalent(blocks, [case.upstream(torch.float32, seed) for seed in range(8)], "emulated")


@devices
@pytest.mark.parametrize("library", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_statistics_are_of_the_stored_values(
    dtype: torch.dtype, library: str, device: tuple[int, int], check: Checks
) -> None:
    """Which the next phase normalises: where |mean| is far above the deviation, rounding makes others of them."""
    check.set(library=library, device=device)
    case = block(3, "none", kernel=1, width=72, act="identity", size=(13, 11))
    x, params, spec = case.build(dtype, torch.channels_last)
    tensors = autograd.tensors_of(params, 30 + x / 8)
    needs = every_gradient(tensors)
    _, outputs, statistics = check.backend.forward(spec, tensors, needs)
    for y, (mean, var) in zip(outputs, statistics, strict=True):
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        assert relative_error(mean, exact_mean) < 1e-6 and relative_error(var, exact_var) < 1e-5


def scale_invariant(case: Case) -> bool:
    """Whether a batch norm takes away the one weight a result has: its gradient is then nothing but rounding."""
    pairs = zip(case.spec.convs, case.sources, case.kernels, strict=True)
    return any(source // stage.groups * prod(kernel) == 1 for stage, source, kernel in pairs)


@settings(family, max_examples=25)
@given(
    case=cases(channels=(2, 3, 4, 6, 8), values=48).map(eightfold),
    mode=st.sampled_from(MODES),
    memory_format=st.sampled_from(FORMATS),
    library=st.sampled_from(["none", "none", "spatial", "all"]),
    device=st.sampled_from([(1, 1), (1, 2), (64, 1), (64, 3), (64, 5)]),
)
def test_any_block(
    case: Case,
    mode: str,
    memory_format: torch.memory_format,
    library: str,
    device: tuple[int, int],
    check: Checks,
) -> None:
    assume(not scale_invariant(case) and not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    check.trains(case, mode, memory_format=memory_format, seeds=range(8), library=library, device=device)


@settings(family, max_examples=20)
@given(
    case=cases(channels=(2, 3, 4), values=48).map(eightfold),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(HALVES),
    float_norms=st.booleans(),
    device=st.sampled_from([(1, 2), (64, 3)]),
)
def test_any_block_in_16_bits(
    case: Case, mode: str, dtype: torch.dtype, float_norms: bool, device: tuple[int, int], check: Checks
) -> None:
    assume(not scale_invariant(case) and not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    check.trains(case, mode, dtype, seeds=range(8), norm_dtype=torch.float32 if float_norms else None, device=device)


def test_a_fused_model_trains_and_verifies(check: Checks) -> None:
    check.set(device=LARGE)
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 8, 2, down))
    x = torch.randn(4, 6, 6, 6)
    for train in (True, False):
        report = resnet_fused.verify(model, x, train=train, backend="emulated", seeds=1)
        assert report.ok, report.table()
    assert check.emulator.launched()
