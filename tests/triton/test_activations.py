"""Every activation in Triton's kernels, wherever a block may have it, against the fp64 reference and at its kinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block, frozen
from support.equivalence import assert_as_accurate
from support.runs import run, run_exact

from resnet_fused import functional, triton_kernels
from resnet_fused.backends import how
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import Activation, BlockSpec, StageSpec
from resnet_fused.spec.activations import KINDS

if triton_kernels.why_not("cpu") is not None:
    pytest.skip("the tests of the interpreter run on machines without a GPU", allow_module_level=True)

PLACES = {
    "post, identity": {"skip": "identity"},
    "post, projection": {"skip": "projection", "skip_scale": "0-d"},
    "post, none": {"skip": "none"},
    "pre": {"skip": "identity", "order": "pre"},
    "branch": {"skip": "projection", "order": "branch", "branch_scale": "[C]"},
}
places = pytest.mark.parametrize("place", PLACES)
acts = pytest.mark.parametrize("act", KINDS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference runs are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_of(place: str, act: str | Activation, **changes: object) -> Case:
    """Two stages that fill a tile of the interpreter's; PReLU's slopes are [C] for odd widths, [1] for even ones."""
    shape = {"kernel": 1, "channels": 16, "width": 15, "size": (5, 6)}
    return block(2, act=act, **(shape | PLACES[place] | changes))  # type: ignore[arg-type]


def check(case: Case, dtype: torch.dtype = torch.float32, mode: how.Mode = "phased", library: str = "none") -> None:
    blocks = [case.build(dtype, torch.channels_last, seed) for seed in range(2)]
    with how.launch_mode(mode), how.library_convolutions(library):  # type: ignore[arg-type]
        assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in range(2)], "triton")


@places
@acts
def test_training(act: str, place: str) -> None:
    check(case_of(place, act))


@places
@acts
def test_evaluation(act: str, place: str) -> None:
    """The last convolution has one tap, so that two of them run at once."""
    built = [frozen(case_of(place, act)).build(torch.float32, torch.channels_last, seed) for seed in range(2)]
    with torch.no_grad():
        got = [functional.residual_block(*each, backend="triton") for each in built]
    eager = [functional.residual_block(*each, backend="eager") for each in built]
    exact = [run_exact(*each)["out"] for each in built]
    assert_as_accurate("out", torch.stack(got), torch.stack(eager), torch.stack(exact))  # type: ignore[arg-type]


# From here on what differs by the way an activation is told backward: by out, by the sum, by the branch's norm.


@pytest.mark.parametrize(
    ("act", "place", "changes"),
    [
        ("gelu", "post, identity", {"skip_scale": "[C]", "branch_scale": "0-d"}),
        ("hardswish", "post, projection", {"memory": "low"}),
        ("gelu_tanh", "branch", {"memory": "low", "skip_scale": "[C]"}),
        ("hardswish", "branch", {"skip": "identity", "skip_scale": "0-d"}),
        ("relu", "branch", {"skip": "identity"}),
        ("relu6", "branch", {"skip": "none"}),
        ("gelu", "post, projection", {"norm": False, "bias": True}),
        ("gelu", "branch", {"norm": False, "bias": True}),
        ("hardsigmoid", "post, identity", {"batch_stats": False, "kernel": 3}),
        ("hardswish", "pre", {"skip": "projection", "kernel": 3}),
        ("prelu", "post, projection", {"channels": 13}),
        ("prelu", "branch", {"channels": 13, "branch_scale": "0-d"}),
        ("prelu", "branch", {"branch_scale": "one"}),
        ("prelu", "pre", {"channels": 13, "norm": False}),
    ],
)
def test_of_other_blocks(act: str, place: str, changes: dict[str, object]) -> None:
    check(case_of(place, act, **changes), mode="single")


def test_a_negative_slope_is_told_by_the_argument() -> None:
    check(case_of("post, identity", Activation("leaky_relu", -0.3)))


@pytest.mark.parametrize(
    ("act", "place"),
    [
        ("gelu", "post, identity"),
        ("gelu_tanh", "branch"),
        ("relu6", "pre"),
        ("hardswish", "branch"),
        ("hardsigmoid", "pre"),
        ("leaky_relu", "post, projection"),
        ("prelu", "branch"),
    ],
)
def test_in_16_bits(act: str, place: str) -> None:
    check(case_of(place, act), torch.bfloat16)


@pytest.mark.parametrize(("act", "place"), [("prelu", "branch"), ("gelu", "post, projection")])
def test_around_the_library(act: str, place: str) -> None:
    check(case_of(place, act), library="all")


@acts
def test_kinks_and_nan(act: str) -> None:
    """Values and derivatives are PyTorch's where an activation has a kink and beside it, and NaN stays NaN."""
    stage = StageSpec(norm=False, act=act)
    slope = torch.tensor([0.25]) if KINDS[act].learned else None
    weight = torch.ones(1, 1, 1, 1)
    params = BlockParams((StageParams(weight, slope=slope), StageParams(weight, slope=slope)))
    values = [float("nan"), -7.0, -3.0, -2.0, -0.0, 0.0, 1e-30, 0.5, 3.0, 5.0, 6.0, 7.0]
    x = torch.tensor(values).reshape(1, 1, 1, -1)
    for stages in (1, 2):
        spec = BlockSpec((stage,) * stages, "none")
        given = replace(params, stages=params.stages[:stages])
        got, eager = (run(x, given, spec, backend, torch.ones_like(x)) for backend in ("triton", "eager"))
        for name in ("out", "grad of x"):
            torch.testing.assert_close(got[name], eager[name], rtol=1e-5, atol=1e-6, equal_nan=True)
