"""Triton kernels in Triton's interpreter (or on a GPU) against the fp64 reference, in both launch modes.

The interpreter runs the workers of a launch one after another: a single launch has one worker there, phased launches
have several, so together they show barriers in the right places and partials merged from many workers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.block_equivalence import assert_equivalent
from support.blocks import Case, block
from support.blocks import bottleneck as any_bottleneck
from support.eager_crashes import eager_may_crash
from support.equivalence import assert_as_accurate
from support.frozen_blocks import check_frozen_block
from support.matrix import FORMATS, family
from support.named_tensors import leaves, named_tensors
from support.operator_arguments import every_gradient
from support.random_blocks import cases
from support.runs import run, run_exact
from torch import nn

import resnet_fused
from resnet_fused import functional, triton_kernels
from resnet_fused.backends import dispatch, how
from resnet_fused.errors import BackendError
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.ops import autograd
from resnet_fused.ops.encoding import encode
from resnet_fused.spec.facts import facts

if triton_kernels.why_not("cpu") is not None:
    pytest.skip("the tests of the interpreter run on machines without a GPU", allow_module_level=True)

from resnet_fused.triton_kernels.host import chips
from resnet_fused.triton_kernels.host.forward import forward
from resnet_fused.triton_kernels.host.launch import Launch
from resnet_fused.triton_kernels.host.policies import Policy

MODES = ("single", "phased")
SEEDS = range(2)
bottleneck = partial(any_bottleneck, channels=18, width=6)
launch_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference runs are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(
    case: Case,
    mode: str,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    library: str = "none",
    seeds: Sequence[int] = SEEDS,
) -> None:
    blocks = [case.build(dtype, memory_format, seed) for seed in seeds]
    with how.launch_mode(mode), how.library_convolutions(library):  # type: ignore[arg-type]
        assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in seeds], "triton")


@launch_modes
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_bottleneck(skip: str, order: str, mode: str) -> None:
    check(bottleneck(skip, order), mode, memory_format=FORMATS[mode == "single"])


def test_sums_of_many_workers() -> None:
    """Six partials per channel: one merged too early would be made good by no later worker."""
    check(block(2, "identity", channels=6, width=5, kernel=1, size=(12, 11), batch=3), "phased")


# From here on one mode a case, turn about: the modes share every phase, and the tests above have shown the barriers.


@pytest.mark.parametrize(
    ("skip", "dtype", "mode"),
    [
        ("identity", torch.bfloat16, "single"),
        ("identity", torch.float16, "phased"),
        ("projection", torch.bfloat16, "phased"),
        ("projection", torch.float16, "single"),
    ],
    ids=str,
)
def test_in_16_bits(skip: str, dtype: torch.dtype, mode: str) -> None:
    check(bottleneck(skip), mode, dtype)


@pytest.mark.parametrize(
    ("order", "act", "mode"),
    [
        ("post", "relu", "single"),
        ("post", "identity", "phased"),
        ("pre", "relu", "phased"),
        ("pre", "identity", "single"),
    ],
)
def test_recomputed_outputs(order: str, act: str, mode: str) -> None:
    check(bottleneck("projection", order, act, "low"), mode)
    of_two = block(2, "projection", order=order, act=act, memory="low", stride=2, strides_at=1)  # type: ignore[arg-type]
    check(of_two, mode)


@pytest.mark.parametrize(
    ("skip", "scale", "mode"),
    [
        ("none", "[C]", "single"),
        ("none", "0-d", "phased"),
        ("identity", "float", "phased"),
        ("identity", "[C]", "single"),
        ("projection", "0-d", "single"),
        ("projection", "[C]", "phased"),
    ],
)
def test_scales(skip: str, scale: str, mode: str) -> None:
    check(bottleneck(skip, branch_scale=scale, skip_scale="one" if skip == "none" else scale), mode)


@pytest.mark.parametrize(("groups", "mode"), [(2, "single"), (4, "phased")])
def test_grouped_and_depthwise(groups: int, mode: str) -> None:
    check(block(2, "identity", channels=4, width=4, groups=groups), mode)


@pytest.mark.parametrize(
    ("stride", "dilation", "mode"),
    [
        (1, 2, "single"),
        (2, 1, "phased"),
        (2, 2, "single"),
        (3, 2, "phased"),
        ((1, 2), (2, 3), "single"),
        ((2, 3), (3, 1), "phased"),
    ],
)
def test_stride_and_dilation(stride: object, dilation: object, mode: str) -> None:
    case = block(2, "projection", stride=stride, dilation=dilation, out_channels=5, size=(7, 13))  # type: ignore[arg-type]
    check(case, mode)


@pytest.mark.parametrize(("kernel", "mode"), [(1, "phased"), (2, "single"), (5, "phased")])
def test_stem_shaped(kernel: int, mode: str) -> None:
    check(block(1, "none", kernel=kernel, channels=3, width=18, out_channels=18, stride=2, size=(11, 13)), mode)


@pytest.mark.parametrize(
    ("order", "batch_stats", "mode"),
    [
        ("post", False, "single"),
        ("post", (True, False), "phased"),
        ("pre", False, "phased"),
        ("pre", (False, True), "single"),
    ],
)
def test_running_statistics(order: str, batch_stats: bool | tuple[bool, bool], mode: str) -> None:
    check(block(2, "identity", order=order, batch_stats=batch_stats), mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(("order", "mode"), [("post", "single"), ("pre", "phased")])
def test_without_norms(order: str, mode: str) -> None:
    check(block(2, "identity", order=order, norm=False, bias=True), mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("skip", "library", "mode"),
    [("none", "all", "phased"), ("identity", "spatial", "single"), ("projection", "spatial", "phased")],
)
def test_library_convolutions(skip: str, library: str, mode: str) -> None:
    """Passes around the vendor's convolutions, in one launch between two of them or one each."""
    check(bottleneck(skip), mode, library=library)


@pytest.mark.parametrize("order", ["post", "pre"])
def test_library_convolutions_of_other_blocks(order: str) -> None:
    check(
        bottleneck("projection", order, branch_scale="[C]", skip_scale="0-d", bias=True),
        "phased",
        library="all",
        seeds=range(6),
    )
    check(bottleneck("identity", order, memory="low"), "single", library="spatial")


def scale_invariant(case: Case) -> bool:
    """Whether a batch norm takes away the one weight a result has: its gradient is then nothing but rounding."""
    pairs = zip(case.spec.convs, case.sources, case.kernels, strict=True)
    return any(source // stage.groups * prod(kernel) == 1 for stage, source, kernel in pairs)


@settings(family, max_examples=15)
@given(
    case=cases(),
    mode=st.sampled_from(MODES),
    memory_format=st.sampled_from(FORMATS),
    library=st.sampled_from(["none", "none", "spatial", "all"]),
)
def test_any_block(case: Case, mode: str, memory_format: torch.memory_format, library: str) -> None:
    assume(not scale_invariant(case))
    assume(not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    check(case, mode, memory_format=memory_format, library=library)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("skip", "order", "mode"),
    [
        ("none", "post", "single"),
        ("none", "pre", "phased"),
        ("identity", "post", "single"),
        ("identity", "post", "phased"),
        ("identity", "pre", "single"),
        ("projection", "post", "phased"),
        ("projection", "pre", "single"),
    ],
)
def test_evaluation(skip: str, order: str, mode: str, dtype: torch.dtype) -> None:
    case = bottleneck(skip, order, bias=True)
    spec = replace(
        case.spec,
        stages=tuple(replace(s, batch_stats=False) for s in case.spec.stages),
        projection=None if case.spec.projection is None else replace(case.spec.projection, batch_stats=False),
    )
    assert_evaluates(replace(case, spec=spec, branch_scale="[C]"), mode, dtype)


@pytest.mark.parametrize("library", ["spatial", "all"])
def test_evaluation_with_library_convolutions(library: str) -> None:
    for skip in ("none", "identity", "projection"):
        assert_evaluates(block(2, skip, batch_stats=False), "phased", torch.float32, library)  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [1, 2])
def test_evaluation_of_short_chains(stages: int) -> None:
    for skip in ("identity", "projection"):
        assert_evaluates(block(stages, skip, batch_stats=False, skip_scale="0-d"), "single", torch.float32)  # type: ignore[arg-type]


def assert_evaluates(case: Case, mode: str, dtype: torch.dtype, library: str = "none") -> None:
    built = [case.build(dtype, torch.channels_last, seed) for seed in range(4)]
    with torch.no_grad(), how.launch_mode(mode), how.library_convolutions(library):  # type: ignore[arg-type]
        got = [functional.residual_block(*block, backend="triton") for block in built]
    eager = [functional.residual_block(*block, backend="eager") for block in built]
    exact = [run_exact(*block)["out"] for block in built]
    assert_as_accurate("out", torch.stack(got), torch.stack(eager), torch.stack(exact))  # type: ignore[arg-type]


# --- the rest of the contract ----------------------------------------------------------------------------------------


@launch_modes
def test_same_bits_again(mode: str) -> None:
    x, params, spec = bottleneck("projection").build(torch.bfloat16, torch.channels_last)
    dout = bottleneck("projection").upstream(torch.bfloat16)
    with how.launch_mode(mode):  # type: ignore[arg-type]
        first, second = (run(x, params, spec, "triton", dout) for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items() if t is not None)  # type: ignore[arg-type]


@launch_modes
def test_reads_nothing_that_was_not_written(mode: str) -> None:
    """Fresh memory is NaN here; a value read before it is written would show."""
    case = bottleneck("projection", memory="low", branch_scale="[C]", skip_scale="0-d", bias=True)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    torch.use_deterministic_algorithms(True)  # which is when torch fills uninitialised memory
    try:
        assert torch.empty(1).isnan()
        with how.launch_mode(mode):  # type: ignore[arg-type]
            results = run(x, params, spec, "triton", case.upstream(torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in results.values() if t is not None)


def test_nan_passes_through_relu_and_mask() -> None:
    case = block(2, "identity", norm=False)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    x[0, 0, 2, 3] = float("nan")
    got, eager = (run(x, params, spec, backend, case.upstream(torch.float32)) for backend in ("triton", "eager"))
    for name in ("out", "grad of x"):
        assert torch.equal(got[name].isnan(), eager[name].isnan()), name  # type: ignore[union-attr]
    assert got["out"].isnan().any()  # type: ignore[union-attr]


def test_strided_inputs() -> None:
    """x and dout as slices of wider tensors, weights in either layout."""
    case = bottleneck("identity")
    x, params, spec = case.build(torch.float32)
    wide = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2], x.shape[3] + 2), float("nan"))
    view = wide[:, 1:-2, :, :-2]
    view.copy_(x)
    dout = case.upstream(torch.float32)
    got, expected = (run(t, params, spec, "triton", dout) for t in (view, x))
    assert all(torch.equal(t, expected[name]) for name, t in got.items() if t is not None)  # type: ignore[arg-type]


def test_only_the_wanted_gradients() -> None:
    """Frozen parameters, and an x that needs no gradient, leave the other gradients as they are."""
    case = bottleneck("projection", branch_scale="[C]")
    x, params, spec = case.build(torch.float32, torch.channels_last)
    dout = case.upstream(torch.float32)
    every = run(x, params, spec, "triton", dout)
    for wanted in (
        "stages.0.weight",
        "stages.1.norm_bias",
        "projection.weight",
        "branch_scale",
        "stages.2.norm_weight",
    ):
        chosen = leaves(params, lambda name, wanted=wanted: name == wanted)  # type: ignore[misc]
        functional.residual_block(x, chosen, spec, backend="triton").backward(dout)
        for name, tensor in named_tensors(chosen).items():
            if name == wanted:
                assert torch.equal(tensor.grad, every[f"grad of {name}"]), name  # type: ignore[arg-type]
            else:
                assert tensor.grad is None, name


def test_operators_refuse_what_would_read_out_of_bounds() -> None:
    case = block(2, "identity")
    x, params, spec = case.build(torch.float32, torch.channels_last)
    forward = torch.ops.resnet_fused.residual_block_forward.triton
    backward = torch.ops.resnet_fused.residual_block_backward.triton
    tensors = autograd.tensors_of(params, x)
    lists, needs = tensors.arguments, every_gradient(tensors)
    encoded, flags = encode(spec, needs), needs.flat
    with pytest.raises(ValueError, match="channels"):
        forward(x[:, :3], *lists[1:], *encoded)
    with pytest.raises(ValueError, match="convolutions"):
        forward(*lists[:3], lists[3][:1], *lists[4:], *encoded)
    out, outputs, statistics = forward(*lists, *encoded)
    with pytest.raises(ValueError, match="dout"):
        backward(out[:, :, :2], out, outputs, statistics, *lists, flags, *encoded)
    with pytest.raises(ValueError, match="saved output of convolution 0"):
        backward(out, out, [y[:1] for y in outputs], statistics, *lists, flags, *encoded)


@pytest.mark.parametrize("skip", ["identity", "projection"])
def test_launches(skip: str) -> None:
    """One per direction in single mode; one per phase in phased mode, library convolutions in between."""
    tensors = autograd.tensors_of(*reversed(bottleneck(skip).build(torch.float32, torch.channels_last)[:2]))
    spec = bottleneck(skip).spec
    known = facts(spec)
    for mode, expected in (("single", 1), ("phased", 4 + (skip == "projection"))):
        launches: list[Launch] = []
        forward(spec, known, tensors, Policy(chips.INTERPRETER, mode, submit=launches.append))  # type: ignore[arg-type]
        assert len(launches) == expected
    launches = []
    forward(spec, known, tensors, Policy(chips.INTERPRETER, "single", frozenset({1}), launches.append))
    assert len(launches) == 2, "one before the library's convolution and one after"
    launches = []
    forward(spec, known, tensors, Policy(chips.INTERPRETER, "phased", frozenset(range(4)), launches.append))
    passes = ["conv1: statistics", "conv2: input", "conv2: statistics", "conv3: input", "conv3: statistics", "join"]
    assert [name for launch in launches for name in launch.names if "projection" not in name] == passes


def test_unsupported_dtype_is_named() -> None:
    x, params, spec = block().build(torch.float64)
    with pytest.raises(BackendError, match="float64"):
        functional.residual_block(x, params, spec, backend="triton")


def test_compiles_into_a_graph_of_operators() -> None:
    case = bottleneck("identity")
    x, params, spec = case.build(torch.float32, torch.channels_last)
    x.requires_grad_()

    def step(x: torch.Tensor) -> torch.Tensor:
        return functional.residual_block(x, params, spec, backend="triton")

    out = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    out.sum().backward()
    expected = step(x.detach())
    assert torch.equal(out, expected) and x.grad is not None


def test_a_fused_model_trains_and_verifies() -> None:
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 8, 2, down))
    x = torch.randn(4, 6, 6, 6)
    report = resnet_fused.verify(model, x, train=True, backend="triton", seeds=1)
    assert report.ok, report.table()
    fused = resnet_fused.fuse(copy.deepcopy(model), backend="triton")
    assert {row.backend for row in resnet_fused.explain(fused)} == {"triton"}
    before = fused[0].bn1.running_mean.clone()
    loss = fused(x).square().mean()
    loss.backward()
    assert not torch.equal(fused[0].bn1.running_mean, before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


def test_too_large_for_32_bits_is_named() -> None:
    _, params, spec = block(channels=4).build(torch.float32)
    backend = dispatch.BACKENDS["triton"]
    assert backend.unsupported(torch.empty(8, 4, 512, 512, device="meta"), params, spec) is None
    for shape in ((1, 4, 1 << 14, 1 << 14), (1 << 14, 4, 512, 512)):
        assert "32 bits" in (backend.unsupported(torch.empty(shape, device="meta"), params, spec) or "")


@pytest.mark.usefixtures("no_interpreter")
def test_without_gpu_and_interpreter_the_reason_is_given() -> None:
    x, params, spec = block().build(torch.float32)
    with pytest.raises(BackendError, match="CUDA"):
        functional.residual_block(x, params, spec, backend="triton")


def test_operators_pass_opcheck() -> None:
    """Schemas, fakes and strides of the triton overloads."""
    case = bottleneck("projection")
    x, params, spec = case.build(torch.float32, torch.channels_last)
    tensors = autograd.tensors_of(params, x)
    needs = every_gradient(tensors)
    given = (*tensors.arguments, *encode(spec, needs))
    out, outputs, statistics = torch.ops.resnet_fused.residual_block_forward.triton(*given)
    torch.library.opcheck(torch.ops.resnet_fused.residual_block_forward.triton, given)
    arguments = (
        torch.randn_like(out), out, outputs, statistics, *tensors.arguments, needs.flat, *encode(spec, needs)
    )  # fmt: skip
    torch.library.opcheck(torch.ops.resnet_fused.residual_block_backward.triton, arguments)


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize(
    ("skip", "stride"), [("none", 1), ("none", 2), ("identity", 1), ("projection", 1), ("projection", 2)]
)
def test_frozen_blocks_keep_what_backward_reads(skip: str, stride: int, memory: str) -> None:
    check_frozen_block("triton", skip, memory, stride)  # type: ignore[arg-type]
