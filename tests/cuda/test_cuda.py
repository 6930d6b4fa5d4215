"""The CUDA kernels, run thread by thread on a CPU (tests/emulator), against the fp64 reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from emulator.emulated import EmulatedBackend, Emulator, compiled, installed, outdated
from emulator.faults import FAULTS, OVERRUN, planted
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ops import test_operators
from ops.test_equivalence import LAYOUTS, assert_equivalent, eager_may_crash, pooled
from ops.test_equivalence import poisoned as poisoned  # a fixture
from ops.test_saved_bytes import check_frozen_block
from support.blocks import FORMATS, Case, Results, cases, family, is_buffer, leaves, named_tensors, run, run_exact
from support.blocks import block as any_block
from support.equivalence import assert_as_accurate, relative_error
from support.live_memory import Bytes, live_memory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused import _C, functional  # type: ignore[attr-defined]
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.ops import autograd, operators
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec, StageSpec

MODES = ("single", "phased")
SANITIZED = ("-O1", "-fsanitize=address")
SEEDS, FEW = range(4), range(2)  # pooled, so that one lucky eager rounding does not set the bar; few of many values
HALVES = [torch.bfloat16, torch.float16]
modes = pytest.mark.parametrize("mode", MODES)
# Products read 8 channels at a time; convolutions of other widths are the library's, with our passes around them.
block = partial(any_block, channels=8, width=8)
# The device that planning sees and how many of its workers run. A small one takes large tiles and, in evaluation, a
# chain; a large one small tiles, the phases, and weight gradients in splits.
SMALL, LARGE = (1, 2), (64, 5)
devices = pytest.mark.parametrize("device", [SMALL, LARGE], ids=["small", "large"])


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    reason = outdated()
    assert reason is None, reason
    try:
        return Emulator(compiled("launcher", "-O2"))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(autouse=True)
def backend(emulator: Emulator) -> Iterator[EmulatedBackend]:
    """ "emulated", single launches, nothing left to the library; on one thread, because the reference runs are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    emulator.configure()
    with installed(emulator) as backend:
        backend.set_how("single", "none")
        yield backend
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def faulty(
    request: pytest.FixtureRequest, emulator: Emulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """Launchers that the tests of the tests need: compiled beside the other tests, where any of them will run."""

    def build(name: str) -> Path:
        if name == "sanitized":
            return compiled(name, *SANITIZED)
        fault = OVERRUN if name == "overrun" else FAULTS[name]
        cuda = planted(fault, tmp_path_factory.mktemp("fault") / "cuda")
        flags = SANITIZED if name == "overrun" else ("-O1",)
        return compiled(f"fault-{name.replace(' ', '-')}", *flags, "-DRESNET_FUSED_EMULATOR_TYPE=bf16", cuda=cuda)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as jobs:
        wanted = any("launcher_of" in getattr(item, "fixturenames", ()) for item in request.session.items)
        yield {name: jobs.submit(build, name) for name in [*FAULTS, "sanitized", "overrun"] if wanted}
        jobs.shutdown(cancel_futures=True)


@pytest.fixture
def launcher_of(faulty: dict[str, Future[Path]]) -> Callable[[str], Path]:
    return lambda name: faulty[name].result()


class Checks:
    """Blocks held against the reference on the emulated device."""

    def __init__(self, emulator: Emulator, backend: EmulatedBackend) -> None:
        self.emulator, self.backend = emulator, backend

    def set(
        self,
        mode: str = "single",
        library: str = "none",
        tf32: bool = False,
        device: tuple[int, int] = SMALL,
        shared_memory: int | None = None,
    ) -> None:
        """shared_memory: of a worker, in KiB."""
        self.backend.set_how(mode, library, tf32)  # type: ignore[arg-type]
        self.emulator.configure(*device)
        if shared_memory is not None:
            self.emulator.set_shared_memory(shared_memory << 10)

    def trains(
        self,
        case: Case,
        mode: str = "single",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        seeds: range = SEEDS,
        norm_dtype: torch.dtype | None = None,
        **how: Any,
    ) -> list[str]:
        """The output, every gradient and the running statistics; returns what was launched."""
        self.set(mode, **how)
        blocks = [case.build(dtype, memory_format, seed, norm_dtype) for seed in seeds]
        assert_equivalent(blocks, [case.upstream(dtype, seed) for seed in seeds], "emulated")
        return self.emulator.launched()

    def evaluates(
        self, case: Case, mode: str = "single", dtype: torch.dtype = torch.float32, seeds: range = range(4), **how: Any
    ) -> str:
        """The output without autograd; returns what one call launched."""
        self.set(mode, **how)
        built = [frozen(case).build(dtype, torch.channels_last, seed) for seed in seeds]
        got = pooled([run(*each, "emulated") for each in built])["out"]
        eager = pooled([run(*each, "eager") for each in built])["out"]
        assert_as_accurate("out", got, eager, pooled([run_exact(*each) for each in built])["out"])
        launched = self.emulator.launched()
        once = launched[: len(launched) // len(seeds)]
        assert launched == once * len(seeds)
        return "\n".join(once)


@pytest.fixture
def check(emulator: Emulator, backend: EmulatedBackend) -> Checks:
    return Checks(emulator, backend)


def frozen(case: Case) -> Case:
    """The block with running statistics."""
    spec = case.spec
    projection = spec.projection and replace(spec.projection, batch_stats=False)
    stages = tuple(replace(s, batch_stats=False) for s in spec.stages)
    return replace(case, spec=replace(spec, stages=stages, projection=projection))


def bottleneck(
    skip: str,
    order: str = "post",
    act: str = "relu",
    memory: str = "default",
    channels: int = 24,
    width: int = 8,
    stride: int | None = None,
    **changes: Any,
) -> Case:
    """1x1, 3x3, 1x1; the 3x3 with a stride where there is a projection."""
    step = stride or (2 if skip == "projection" else 1)
    projects = skip == "projection"
    spec = BlockSpec(
        (StageSpec(act=act), StageSpec(step, 1, act=act), StageSpec(act=act)),  # type: ignore[arg-type]
        skip,  # type: ignore[arg-type]
        StageSpec(step, act="identity", norm=order == "post") if projects else None,
        order,  # type: ignore[arg-type]
        memory,  # type: ignore[arg-type]
    )
    widths = (width, width, channels, *[channels] * projects)
    kernels = ((1, 1), (3, 3), (1, 1), *[(1, 1)] * projects)
    return replace(Case(spec, channels, widths, kernels, size=(7, 6)), **changes)


def phases(line: str) -> list[str]:
    """Of a launch, without how they were planned."""
    return [phase.split(" of ")[0].split(",")[0] for phase in re.split(r"; | \| ", line.split(": ")[1])]


def workers(launched: list[str]) -> int:
    """The most that ran at once."""
    return max(int(line.split()[0].rstrip(":")) for line in launched)


# --- training --------------------------------------------------------------------------------------------------------


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


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "width"), [(3, 5), (6, 8), (8, 24), (16, 8), (40, 16)])
def test_channels(channels: int, width: int, dtype: torch.dtype, mode: str, check: Checks) -> None:
    """Rows that can be read 16 bytes at a time and rows that cannot."""
    device = SMALL if mode == "single" else LARGE
    check.trains(bottleneck("identity", channels=channels, width=width), mode, dtype, device=device)
    check.trains(block(1, "none", channels=width, out_channels=channels), mode, dtype, device=device)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, SMALL), (torch.bfloat16, LARGE)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("channels", "width"), [(8, 136), (136, 8), (24, 72), (72, 16)])
def test_wide_channels(channels: int, width: int, dtype: torch.dtype, device: tuple[int, int], check: Checks) -> None:
    """More than a tile's columns, and more than a step's depth."""
    check.trains(bottleneck("identity", channels=channels, width=width), dtype=dtype, seeds=FEW, device=device)


@pytest.mark.parametrize(
    ("dtype", "processors", "count"),
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 3, 5),
        (torch.bfloat16, 64, 1),
        (torch.bfloat16, 64, 5),
        (torch.float32, 64, 3),
    ],
)
def test_many_tiles(dtype: torch.dtype, processors: int, count: int, check: Checks) -> None:
    """Several tiles a worker, several workers a channel, and weight gradients in splits: everything that is merged."""
    case = bottleneck("projection", channels=72, width=8, stride=1, size=(23, 23))
    launched = check.trains(case, dtype=dtype, seeds=FEW, device=(processors, count))
    assert workers(launched) == count and all("cooperative" in line for line in launched)
    tile, splits = (128, 1) if processors < 4 else (64, 4 if dtype == torch.float32 else 2)
    for phase in (f"convolution of {tile} rows", f"data gradient of {tile} rows", f"{splits} splits"):
        assert any(phase in line for line in launched), (phase, launched)


@pytest.mark.parametrize("processors", [1, 64])
def test_wide_and_narrow_blocks_of_channels(processors: int, check: Checks) -> None:
    """More blocks of channels than workers, so that each takes several, and fewer."""
    case = block(2, "projection", channels=8, width=200, out_channels=264, kernel=1, stride=2, size=(9, 8))
    for count in (1, 2, 3, 7):
        check.trains(case, dtype=torch.bfloat16, seeds=FEW, device=(processors, count))


@pytest.mark.parametrize(
    ("dtype", "shared_memory", "stages"),
    [
        (torch.float32, 84, 4),
        (torch.float32, 62, 3),
        (torch.bfloat16, 76, 4),
        (torch.bfloat16, 62, 3),
    ],
)
def test_depths_of_the_pipeline(dtype: torch.dtype, shared_memory: int, stages: int, check: Checks) -> None:
    """Copies that run two or three steps ahead of the products; one, where what dy is made of takes the room."""
    case = bottleneck("projection", channels=72, width=24)
    launched = check.trains(case, dtype=dtype, seeds=FEW, device=LARGE, shared_memory=shared_memory)
    assert all(f"convolution of 64 rows, {stages} stages" in line for line in launched[::2]), launched
    assert all(f"gradient of 64 rows, {stages - 1} stages" in line for line in launched[1::2]), launched
    launched = [check.evaluates(case, dtype=dtype, device=LARGE, shared_memory=shared_memory)]
    assert all(f"convolution of 64 rows, {stages} stages" in line for line in launched), launched


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
    check.trains(case, mode, seeds=range(8))  # one number a block says little


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


def test_whatever_is_chosen(check: Checks) -> None:
    """Left to itself the library has a picture's channels and the kernels the rest."""
    case = block(2, "projection", channels=3, width=16, out_channels=16)
    launched = check.trains(case, "choose", library="choose")
    once = [phases(line) for line in launched[:5]]
    gradients = ["weight gradient", "data gradient"]
    assert once == [
        ["pass"],
        ["pass", "convolution", "pass"],
        ["table", "pass", "pass"],
        ["pass", *gradients, "pass"],
        ["pass"],
    ]


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
    tensors = autograd.flatten(params, 30 + x / 8)
    needs = test_operators.every_gradient(tensors)
    _, outputs, statistics = operators.residual_block_forward(spec, tensors, needs, "cuda", check.backend.how)
    for y, (mean, var) in zip(outputs, statistics, strict=True):
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        assert relative_error(mean, exact_mean) < 1e-6 and relative_error(var, exact_var) < 1e-5


class RoundedToTf32(TorchDispatchMode):
    """Rounds what PyTorch's float32 convolutions multiply to 10 bits of mantissa, as tensor cores take it."""

    OPERANDS: ClassVar = {torch.ops.aten.convolution.default: 2, torch.ops.aten.convolution_backward.default: 3}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = self.OPERANDS.get(func, 0)
        return func(*(self.rounded(t) if i < count else t for i, t in enumerate(args)), **(kwargs or {}))

    @staticmethod
    def rounded(t: Tensor) -> Tensor:
        if t.dtype != torch.float32:
            return t
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@modes
@devices
@pytest.mark.parametrize("act", ["identity", "relu"])
def test_tf32(act: str, device: tuple[int, int], mode: str, check: Checks) -> None:
    """Its error is what rounding the operands costs; without ReLU no mask can flip, and the bar is that alone."""
    for case in (bottleneck("projection", act=act), bottleneck("identity", "pre", act)):
        with RoundedToTf32():
            check.trains(case, mode, device=device, tf32=True)


def test_tf32_is_asked_for(check: Checks) -> None:
    given, dout = bottleneck("identity").build(torch.float32), bottleneck("identity").upstream(torch.float32)
    exact = run_exact(*given, dout)
    errors = []
    for tf32 in (False, True):
        check.set(tf32=tf32)
        got = run(*given, "emulated", dout)
        errors.append(max(float((got[n].double() - exact[n]).abs().max()) for n in ("out", "grad of x")))  # type: ignore[union-attr]
    assert errors[1] > 50 * errors[0]


def eightfold(case: Case) -> Case:
    return replace(case, channels=8 * case.channels, widths=tuple(8 * width for width in case.widths))


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


# --- evaluation ------------------------------------------------------------------------------------------------------


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


def test_evaluation_in_tf32(check: Checks) -> None:
    with RoundedToTf32():
        assert "chain" in check.evaluates(bottleneck("projection"), tf32=True)
        assert "chain" not in check.evaluates(bottleneck("projection"), tf32=True, device=LARGE)


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


# --- values that are not finite --------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_nan_goes_where_the_formula_lets_it(
    batch_stats: bool, order: str, dtype: torch.dtype, device: tuple[int, int], check: Checks
) -> None:
    check.set(device=device)
    case = block(2, "identity", order=order, size=(9, 8), batch_stats=batch_stats)  # type: ignore[arg-type]
    x, params, spec = case.build(dtype)
    x[1, 2, 4, 3] = torch.nan
    dout = case.upstream(dtype)
    got, exact = run(x, params, spec, "emulated", dout), run_exact(x, params, spec, dout)
    assert got["out"].isnan().any()  # type: ignore[union-attr]
    for name, value in exact.items():
        assert torch.equal(got[name].isnan(), value.isnan()), name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, SMALL), (torch.bfloat16, SMALL), (torch.float16, LARGE)], ids=str
)
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_nan_survives_evaluation(
    order: str, skip: str, dtype: torch.dtype, device: tuple[int, int], check: Checks
) -> None:
    """Through every ReLU, and no further than its window."""
    check.set(device=device)
    for stages in (1, 3):
        case = block(stages, skip, order=order, size=(19, 10), batch_stats=False)  # type: ignore[arg-type]
        x, params, spec = case.build(dtype)
        x[1, 2, 4, 3] = torch.nan
        got, exact = run(x, params, spec, "emulated")["out"], run_exact(x, params, spec)["out"]
        assert torch.equal(got.isnan(), exact.isnan()) and got.isnan().any() and not got.isnan().all()  # type: ignore[union-attr]


@devices
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_infinity_goes_where_the_formula_lets_it(
    skip: str, value: float, dtype: torch.dtype, device: tuple[int, int], check: Checks
) -> None:
    """In 16 bits. The two parts of a float32 weight may differ in sign, and then make NaN of an infinity."""
    check.set(device=device)
    case = frozen(bottleneck(skip, channels=24, width=8, stride=1, size=(9, 8)))
    x, params, spec = case.build(dtype)
    params = map_tensors(params, lambda n, t: t if is_buffer(n) else t.abs())  # of two signs it would make NaN
    x[0, 1, 4, 3] = value
    exact = run_exact(x, params, spec)["out"]
    assert exact.isinf().any() == (value > 0)  # type: ignore[union-attr]
    for dout in (None, case.upstream(dtype)):
        got = run(x, params, spec, "emulated", dout)["out"]
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(exact)), kind  # type: ignore[arg-type]


def test_relu_has_no_gradient_at_zero(check: Checks) -> None:
    """gamma = beta = 0 and x = 0 put every ReLU exactly at 0, where nothing but the skip path may pass."""
    check.set()
    for order in ("post", "pre"):
        for skip in ("none", "identity"):
            case = block(2, skip, order=order)  # type: ignore[arg-type]
            x, params, spec = case.build(torch.float32)
            params = map_tensors(params, lambda n, t: t * 0 if "norm_" in n else t)
            got = run(x * 0, params, spec, "emulated", case.upstream(torch.float32))
            for name, value in got.items():
                if not name.startswith("grad"):
                    continue
                if name == "grad of x" and order == "pre" and skip == "identity":
                    assert torch.equal(value, case.upstream(torch.float32))  # type: ignore[arg-type]
                else:
                    assert not value.any(), name  # type: ignore[union-attr]


# --- the rest of the contract ----------------------------------------------------------------------------------------


def assert_same_bits(got: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert value is None or torch.equal(got[name], value), name  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """A block, what is done with it, and where."""

    case: Case
    device: tuple[int, int]
    training: bool = True
    mode: str = "single"
    library: str = "none"

    def results(
        self, emulator: Emulator, backend: EmulatedBackend, seed: int, before: Callable[[], None] = lambda: None
    ) -> Results:
        """In bfloat16, the threads in the order of `seed`."""
        backend.set_how(self.mode, self.library)  # type: ignore[arg-type]
        emulator.configure(*self.device, seed=1000 * seed)
        before()
        dout = self.case.upstream(torch.bfloat16) if self.training else None
        return run(*self.case.build(torch.bfloat16, torch.channels_last), "emulated", dout)


RUNS = {
    "training": Run(bottleneck("projection", channels=24, width=16, size=(15, 13)), (64, 3)),
    "evaluation": Run(frozen(bottleneck("projection", channels=24, width=16, size=(17, 15), bias=True)), (1, 2), False),
    "splits": Run(block(2, "none", channels=24, width=72, kernel=1, size=(23, 23)), (64, 5)),
    "large tiles": Run(bottleneck("identity", "pre", channels=72, width=8, size=(17, 19)), (2, 4)),
    "odd channels": Run(
        bottleneck("identity", channels=13, width=5, memory="low", branch_scale="[C]", size=(17, 19)), (64, 2)
    ),
    "reductions": Run(
        block(1, "none", order="pre", kernel=1, channels=256, out_channels=8, size=(13, 11)), (64, 6), library="all"
    ),
    "phases": Run(bottleneck("projection", "pre"), (64, 3), mode="phased"),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", RUNS)
def test_same_bits_in_any_order_of_threads(name: str, emulator: Emulator, backend: EmulatedBackend) -> None:
    first, *others = (RUNS[name].results(emulator, backend, seed) for seed in range(8))
    for other in others:
        assert_same_bits(other, first)


def test_runs_meet_what_they_are_for(emulator: Emulator, backend: EmulatedBackend) -> None:
    expected = {
        "training": ["3 cooperative: ", "data gradient of 64 rows, 4 stages"],
        "evaluation": ["2: chain with projection"],
        "splits": ["5 cooperative: ", ", 2 splits"],
        "large tiles": ["of 128 rows"],
        "odd channels": ["2 cooperative: "],
        "reductions": ["6 cooperative: pass | pass"],
        "phases": ["2: convolution of 64 rows"],
    }
    for name, texts in expected.items():
        RUNS[name].results(emulator, backend, 0)
        launched = "\n".join(emulator.launched())
        assert all(text in launched for text in texts), (name, launched)


@pytest.mark.usefixtures("poisoned")
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_nothing_that_was_not_written(dtype: torch.dtype, mode: str, check: Checks) -> None:
    """Fresh memory is NaN here; a value read before it is written would show."""
    scales: Any = {"branch_scale": "[C]", "skip_scale": "0-d", "bias": True}
    width = 72 if dtype == torch.float32 else 136
    for device in (SMALL, LARGE):
        for case in (
            bottleneck("projection", memory="low", **scales),
            bottleneck("identity", "pre", channels=24, width=width, **scales),
        ):
            check.set(mode, device=device)
            x, params, spec = case.build(dtype, torch.channels_last)
            trained = run(x, params, spec, "emulated", case.upstream(dtype))
            evaluated = run(*frozen(case).build(dtype, torch.channels_last), "emulated")
            assert all(t is None or t.isfinite().all() for t in [*trained.values(), evaluated["out"]])


@pytest.mark.parametrize("which", ["x", "weights", "dout", "norms"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "misaligned"])
@pytest.mark.parametrize(("channels", "dtype"), [(8, torch.float32), (16, torch.bfloat16), (6, torch.float16)], ids=str)
def test_strided_tensors(channels: int, dtype: torch.dtype, layout: str, which: str, check: Checks) -> None:
    """Windows of wider tensors whose rest is NaN, permuted and misaligned ones: the same bits as from dense tensors."""
    check.set(device=LARGE)
    arrange = {**LAYOUTS, "misaligned": misaligned}[layout]

    def vector(t: Tensor) -> Tensor:
        return arrange(t.reshape(1, -1, 1, 1))[0, :, 0, 0]

    def change(name: str, t: Tensor) -> Tensor:
        if which == "weights" and t.dim() == 4:
            return arrange(t)
        return vector(t) if which == "norms" and t.dim() == 1 else t

    for case in (bottleneck("projection", channels=channels), frozen(bottleneck("identity", channels=channels))):
        x, params, spec = case.build(dtype, torch.channels_last)
        dout = case.upstream(dtype)
        given = (arrange(x) if which == "x" else x, map_tensors(params, change), spec)
        got = run(*given, "emulated", arrange(dout) if which == "dout" else dout)
        assert_same_bits(got, run(x, params, spec, "emulated", dout))
        if not spec.batch_stats and which != "dout":
            assert_same_bits(run(*given, "emulated"), run(x, params, spec, "emulated"))


def misaligned(t: Tensor) -> Tensor:
    """Channels last, one value behind an aligned address."""
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    n, c, h, w = t.shape
    return flat[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def test_expanded_upstream_gradient(check: Checks) -> None:
    """``out.sum().backward()`` hands over a gradient whose strides are all 0."""
    check.set()
    for order in ("post", "pre"):
        case = block(2, order=order)  # type: ignore[arg-type]
        given, ones = case.build(torch.float32), torch.ones(case.out_shape)
        assert_same_bits(run(*given, "emulated", torch.ones(()).expand(case.out_shape)), run(*given, "emulated", ones))


@modes
def test_only_the_wanted_gradients(mode: str, check: Checks) -> None:
    """Frozen parameters, and an x that needs no gradient, leave the other gradients as they are."""
    check.set(mode)
    for order in ("post", "pre"):
        case = bottleneck("projection", order, branch_scale="[C]", skip_scale="0-d", bias=True)
        x, params, spec = case.build(torch.float32, torch.channels_last)
        dout = case.upstream(torch.float32)
        every = run(x, params, spec, "emulated", dout)
        for wanted in named_tensors(params):
            if f"grad of {wanted}" not in every:
                continue
            chosen = leaves(params, lambda name, wanted=wanted: name == wanted)  # type: ignore[misc]
            functional.residual_block(x, chosen, spec, backend="emulated").backward(dout)
            for name, tensor in named_tensors(chosen).items():
                if name == wanted:
                    assert torch.equal(tensor.grad, every[f"grad of {name}"]), name  # type: ignore[arg-type]
                else:
                    assert tensor.grad is None, name


@settings(family, max_examples=25)
@given(case=cases(), choice=st.lists(st.booleans(), min_size=27, max_size=27), library=st.sampled_from(["none", "all"]))
def test_any_choice_of_gradients(case: Case, choice: list[bool], library: str, check: Checks) -> None:
    check.set(library=library)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    dout, count = case.upstream(torch.float32), 3 + 6 * len(spec.convs)
    every, some = (
        test_operators.backward_arguments(x, params, spec, dout, needs) for needs in ([True] * count, choice[:count])
    )
    ints, eps = spec.encode(check.backend.how)
    backward = torch.ops.resnet_fused.residual_block_backward.cuda
    all_grads = iter(backward(*every[:-2], ints, eps))
    expected = [next(all_grads) if need else None for need in every[-3]]  # type: ignore[attr-defined]
    got = backward(*some[:-2], ints, eps)
    wanted = [e for e, need in zip(expected, some[-3], strict=True) if need]  # type: ignore[call-overload]
    for grad, value in zip(got, wanted, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", ["identity", "projection"])
def test_launches(skip: str, check: Checks) -> None:
    """One a direction in single mode; one a phase in phased mode; the library's convolutions in between."""
    case = bottleneck(skip, channels=24, width=16)
    given, dout = case.build(torch.bfloat16, torch.channels_last), case.upstream(torch.bfloat16)
    projects = int(skip == "projection")
    gradients = ["weight gradient", "data gradient"]

    def launched(**how: Any) -> list[str]:
        check.set(**how)
        run(*given, "emulated", dout)
        return check.emulator.launched()

    single = launched()
    assert all("cooperative" in line for line in single)
    forward, backward = map(phases, single)
    assert forward == ["convolution"] * (3 + projects) + ["pass"]
    middle = ["pass", *gradients]  # the 3x3 has its dy written out
    assert backward == ["table", "table", "pass", *gradients * projects, *gradients, *middle, *gradients]
    phased = launched(mode="phased")
    assert not any("cooperative" in line for line in phased)
    assert [phases(line) for line in phased] == [[phase] for phase in forward + backward]
    assert len(launched(library="spatial")) == 2 + 2, "each direction stops for the 3x3"


def test_a_block_of_more_phases_than_a_launch_holds(check: Checks) -> None:
    """It takes two."""
    scales: Any = {"branch_scale": "[C]", "skip_scale": "[C]"}
    case = block(3, "projection", order="pre", memory="low", out_channels=16, **scales)
    launched = check.trains(case)
    assert len(launched) == 3 * len(SEEDS) and max(len(phases(line)) for line in launched) == 16


@pytest.mark.parametrize(
    ("skip", "memory", "mode", "library", "share"),
    [
        ("identity", "default", "phased", "none", 0.75),
        ("projection", "low", "phased", "none", 0.6),
        ("identity", "default", "single", "all", 0.35),
        ("projection", "low", "phased", "all", 0.3),
    ],
)
def test_memory_is_free_after_the_last_phase_that_reads_it(
    skip: Any, memory: Any, mode: Any, library: Any, share: float, check: Checks
) -> None:
    """share: of what a backward pass allocates in all, how much lives at the same time. A launch of all needs all."""
    case = block(3, skip, memory=memory, channels=64, width=16, out_channels=64, size=(8, 8))
    x, params, spec = case.build(torch.bfloat16, torch.channels_last)
    tensors, dout = (
        autograd.flatten(params, x),
        case.upstream(torch.bfloat16).contiguous(memory_format=torch.channels_last),
    )
    needs = [t is not None and (i < 3 or (i - 3) % 6 < 4) for i, t in enumerate(tensors)]

    def lives() -> Bytes:
        out, ys, stats = check.backend.forward(spec, tensors, needs)
        return live_memory(lambda: check.backend.backward(spec, dout, out, ys, stats, tensors, needs))

    check.set(mode, library)
    found = lives()
    assert found.peak < share * found.allocated
    check.set("single", "none")
    together = lives()
    assert together.peak == together.allocated


def operator(name: str) -> Any:
    return getattr(torch.ops.resnet_fused, f"residual_block_{name}").cuda


OPERATORS = ["forward", "backward", "infer"]


def arguments(name: str, case: Case, how: int, memory_format: torch.memory_format = torch.channels_last) -> list[Any]:
    given = list(test_operators.arguments(f"residual_block_{name}", case, torch.float32, memory_format))
    at = -1 if name == "infer" else -2
    ints = list(given[at])  # type: ignore[call-overload]
    ints[4] = how
    given[at] = ints
    return given


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_opcheck(name: str, check: Checks) -> None:
    check.set()
    torch.library.opcheck(operator(name), arguments(name, test_operators.CASES["bottleneck"], check.backend.how))


@pytest.mark.parametrize("name", OPERATORS)
@given(case=cases(), memory_format=st.sampled_from(FORMATS), library=st.sampled_from(["choose", "none", "all"]))
@settings(family, max_examples=25)
def test_fakes_of_any_block(
    name: str, case: Case, memory_format: torch.memory_format, library: str, check: Checks
) -> None:
    check.set(library=library)
    given = tuple(arguments(name, case, check.backend.how, memory_format))
    with FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given)
        fake = test_operators.description(operator(name)(*faked))
    assert fake == test_operators.description(operator(name)(*given))


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("forward", 0, torch.randn(2, 4, 7), "non-empty"),
        ("forward", 0, torch.randn(2, 5, 7, 6), "receives 5 channels"),
        ("forward", 0, torch.randn(2, 4, 7, 6).double(), "x is Double"),
        ("forward", 1, torch.ones(5), "branch_scale must hold 1 value or 6"),
        ("forward", 3, [], "one entry a convolution"),
        ("forward", 5, [torch.ones(2)] * 4, "must be"),
        ("forward", 8, [None], "one entry a convolution"),
        ("forward", 9, [True], "needs must have 27 flags"),
        ("forward", 10, [3, 2, 0, 0, 0], "5 \\+ 9 k ints"),
        ("forward", 11, [0.1], "as many eps"),
        ("backward", 0, torch.randn(2, 6, 4, 4), "dout must be"),
        ("backward", 0, torch.randn(2, 6, 4, 3).double(), "dout is Double"),
        ("backward", 1, None, "needs the block's output"),
        ("backward", 1, torch.randn(2, 6, 3, 3), "needs the block's output"),
        ("backward", 2, [], "the output of convolution 0 must be saved"),
        ("backward", 2, [torch.randn(2, 3, 1, 1)] * 4, "the output of convolution 0 must be saved"),
        ("backward", 3, [torch.randn(2, 1)] * 4, "batch statistics of convolution 0"),
        ("backward", 13, [True], "needs must have 27 flags"),
        ("infer", 0, torch.randn(2, 5, 7, 6), "receives 5 channels"),
        ("infer", 4, [torch.ones(2)] * 4, "bias of convolution 0"),
        ("infer", 6, [3, 2], "5 \\+ 9 k ints"),
    ],
)
def test_bad_arguments_are_refused(name: str, index: int, value: object, message: str, check: Checks) -> None:
    """The operators hold their arguments against the spec: nothing is read out of bounds."""
    check.set()
    given = arguments(name, test_operators.CASES["bottleneck"], check.backend.how)
    given[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        operator(name)(*given)
    assert check.emulator.launched() == []


def test_saved_tensors_of_another_dtype_are_refused(check: Checks) -> None:
    check.set()
    given = arguments("backward", test_operators.CASES["bottleneck"], check.backend.how)
    for index in (2, 3):
        wrong = list(given)
        wrong[index] = [t.bfloat16() for t in given[index]]
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            operator("backward")(*wrong)


def test_unsupported_dtype_is_named(check: Checks) -> None:
    check.set()
    case = block()
    given = case.build(torch.float64)
    with pytest.raises(TypeError, match="float32, bfloat16 and float16, got Double"):
        run(*given, "emulated", case.upstream(torch.float64))


def test_too_large_is_named(check: Checks) -> None:
    check.set()
    tall = block(1, "none", channels=1, out_channels=1, kernel=1, norm=False, size=(1 << 14, 1), batch=1)
    with pytest.raises(ValueError, match="up to 16383 rows"):
        run(*tall.build(torch.bfloat16), "emulated")
    wide = block(1, "none", channels=1, out_channels=1 << 14, kernel=1, norm=False, size=(256, 129), batch=1)
    with pytest.raises(ValueError, match="about 2\\^29 values an image"):
        run(*wide.build(torch.bfloat16), "emulated")
    assert check.emulator.launched() == []


def buffers(given: tuple[Tensor, BlockParams, BlockSpec]) -> dict[str, Tensor]:
    return {name: t for name, t in named_tensors(given[1]).items() if is_buffer(name)}


@modes
def test_a_failing_launch_changes_nothing(mode: str, check: Checks) -> None:
    """It is an error with the launcher's text, statistics stay as they were, and the next call does not know of it."""
    check.set(mode)
    case = bottleneck("projection")
    x, params, spec = given = case.build(torch.float32, torch.channels_last)
    dout = case.upstream(torch.float32)
    expected = run(*given, "emulated", dout)
    count = len(check.emulator.launched())
    before = {name: t.clone() for name, t in buffers(given).items()}
    for launches in range(count):
        check.emulator.configure()
        check.emulator.fail_at(launches, "the emulated device is out of order")
        x.grad, chosen = None, leaves(params, lambda _: True)
        with pytest.raises(RuntimeError, match="resnet_fused: the emulated device is out of order"):
            functional.residual_block(x.requires_grad_(), chosen, spec, backend="emulated").backward(dout)
        in_forward = launches < (1 if mode == "single" else 5)
        for name, t in named_tensors(chosen).items():
            if is_buffer(name):
                assert torch.equal(t, before[name]) == in_forward, name
            else:
                assert t.grad is None, name
        assert x.grad is None
    check.emulator.configure()
    assert_same_bits(run(*given, "emulated", dout), expected)


def test_a_device_without_room_is_named(check: Checks) -> None:
    given = bottleneck("identity").build(torch.float32)
    check.set(shared_memory=20)
    with pytest.raises(RuntimeError, match=r"a phase needs \d+ bytes of shared memory, device 0 has 20480"):
        run(*given, "emulated")
    check.set(device=(1, 0))
    with pytest.raises(RuntimeError, match="no worker with"):
        run(*given, "emulated")


def test_workspaces_of_graphs(check: Checks) -> None:
    """Under capture a call brings counters of its own."""
    check.set()
    given, dout = bottleneck("identity").build(torch.float32), bottleneck("identity").upstream(torch.float32)
    expected = run(*given, "emulated", dout)
    check.emulator.set_capturing(True)
    assert_same_bits(run(*given, "emulated", dout), expected)


def test_without_a_device_nothing_runs(check: Checks) -> None:
    """What a user meets who calls the overload on CPU tensors."""
    check.set()
    given, dout = bottleneck("identity").build(torch.float32), bottleneck("identity").upstream(torch.float32)
    before = {name: t.clone() for name, t in buffers(given).items()}
    _C.install_emulator(0)
    try:
        with pytest.raises(NotImplementedError, match="CUDA kernels run on CUDA tensors, x is on the CPU"):
            functional.residual_block(*given, backend="emulated")
        for name in OPERATORS:
            with pytest.raises(NotImplementedError, match="CUDA kernels run on CUDA tensors"):
                operator(name)(*arguments(name, test_operators.CASES["bottleneck"], 0))
    finally:
        check.emulator.install()
    assert all(torch.equal(t, before[name]) for name, t in buffers(given).items())
    run(*given, "emulated", dout)


def test_compiles_into_a_graph_of_operators(check: Checks) -> None:
    check.set()
    x, params, spec = bottleneck("identity").build(torch.float32, torch.channels_last)
    x.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return functional.residual_block(x, params, spec, backend="emulated")

    out = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    out.sum().backward()
    assert torch.equal(out, step(x.detach())) and x.grad is not None


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


# --- tests of the tests ----------------------------------------------------------------------------------------------


def differs(got: Results, expected: Results) -> bool:
    return any(value is not None and not torch.equal(got[name], value) for name, value in expected.items())  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned")  # else what is read too early may be what an earlier call has left there
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_shows(
    name: str, launcher_of: Callable[[str], Path], emulator: Emulator, backend: EmulatedBackend
) -> None:
    """In one order of the threads at least, as other bits than the honest kernels', NaN, or an error."""
    chosen, orders = RUNS[FAULTS[name].block], FAULTS[name].orders
    honest = chosen.results(emulator, backend, 0)
    broken = Emulator(launcher_of(name))
    broken.install()
    shown = 0
    for seed in range(orders):
        try:
            got = chosen.results(broken, backend, seed)
        except RuntimeError:
            shown += 1
        else:
            shown += differs(got, honest)
    print(f"shown in {shown} of {orders} orders")
    assert shown == 0 if name == "none" else shown > 0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["identity", "projection", "evaluation"])
def test_each_barrier_of_the_plan_is_needed(name: str, emulator: Emulator, backend: EmulatedBackend) -> None:
    """Left out, it shows: so no other is missing where this block's phases wait for each other."""
    shape: Any = {"channels": 72, "width": 8, "size": (9, 9)}  # work for all workers, little of it in a phase
    chosen = {
        "identity": Run(bottleneck("identity", "pre", bias=True, **shape), (64, 3)),
        "projection": Run(bottleneck("projection", memory="low", stride=1, **shape), (64, 3)),
        "evaluation": Run(frozen(bottleneck("projection", "pre", stride=1, **shape)), (64, 3), False),
    }[name]
    honest = chosen.results(emulator, backend, 0)
    launched = emulator.launched()
    barriers = [
        (launch, phase)
        for launch, line in enumerate(launched)
        for phase, before in enumerate(re.findall(r"(: |; | \| )", line))
        if before == " | "
    ]
    assert len(barriers) > 2

    def shows(launch: int, phase: int) -> bool:
        runs = (
            chosen.results(emulator, backend, seed, partial(emulator.leave_out_barrier, launch, phase))
            for seed in range(16)
        )
        return any(differs(got, honest) for got in runs)

    silent = [phases(launched[launch])[phase] for launch, phase in barriers if not shows(launch, phase)]
    # the last convolution's gradients wait for the projection's, which nothing but dx reads
    allowed = ["weight gradient"] if chosen.training and chosen.case.spec.projection else []
    assert silent in ([], allowed)


def under_sanitizer(launcher: Path, *dtypes: str) -> subprocess.CompletedProcess[str]:
    """PyTorch asks for memory where AddressSanitizer sees it, and throws through libstdc++, which it watches, too."""
    preloaded = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    program = Path(__file__).parents[1] / "emulator" / "sanitized.py"
    environment = {**os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(program), str(launcher), *dtypes]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_address_sanitizer_finds_nothing(launcher_of: Callable[[str], Path]) -> None:
    done = under_sanitizer(launcher_of("sanitized"), "float32", "bfloat16")
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]


def test_address_sanitizer_finds_a_planted_overrun(launcher_of: Callable[[str], Path]) -> None:
    done = under_sanitizer(launcher_of("overrun"), "bfloat16")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "WRITE of size 2" in done.stderr, done.stderr


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_frozen_blocks_keep_what_backward_reads(skip: str, memory: str) -> None:
    check_frozen_block("emulated", skip, memory)  # type: ignore[arg-type]
