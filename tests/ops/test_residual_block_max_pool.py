"""residual_block_max_pool2d is max_pool2d(residual_block()): on the engine in one, elsewhere as these two calls."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.blocks import Case, block, frozen
from support.engine_blocks import TABLE, chain
from support.engine_runs import in_eager, on_engine, threads
from support.matrix import FORMATS
from support.named_tensors import is_buffer, leaves, named_tensors, to_double
from torch import Tensor

from resnet_fused import functional
from resnet_fused.backends import prepared
from resnet_fused.errors import BackendError
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec, StageSpec

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
STEM = chain(3, ((7, 7), 16, StageSpec(2, 3)), size=(21, 18))
BLOCKS = {
    "stem": STEM,
    "one convolution": chain(5, ((3, 3), 33, StageSpec(1, 1, act="silu")), size=(9, 8)),
    "groups": chain(8, ((3, 3), 16, StageSpec(1, 1, groups=4)), size=(9, 8)),
    "deep stem": TABLE["deep stem"].case,
}
WINDOWS = [(3, 2, 1), (2, 2, 0), (1, 1, 0), (2, 1, 1), (3, 3, 0), (5, 1, 2)]


def in_two(x: Tensor, params: BlockParams, spec: BlockSpec, *window: int) -> Tensor:
    return functional.max_pool2d(functional.residual_block(x, params, spec), *window)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert all(got.is_contiguous(memory_format=f) == expected.is_contiguous(memory_format=f) for f in FORMATS)


@dtypes
@formats
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_evaluation(name: str, window: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """The same bits: a maximum is not rounded."""
    for batch in (1, 3):
        case = replace(frozen(BLOCKS[name]), batch=batch)
        x, params, spec = case.build(dtype, memory_format)
        for count in (1, 7):
            with threads(count):
                got = functional.residual_block_max_pool2d(x, params, spec, *window)
                assert_equal(got, in_two(x, params, spec, *window))


@torch.no_grad()
def test_the_engine_pools() -> None:
    """In bands and parts, whose windows overlap."""
    for name in ("stem and pooling", "deep stem and pooling", "large stem and pooling"):
        entry = TABLE[name]
        x, params, spec = entry.case.build(torch.float32)
        assert entry.pool is not None
        got = on_engine(x, params, spec, entry.pool)
        kept = prepared.prepared(params, x, spec, entry.pool)
        assert_equal(got, in_two(x, params, spec, *entry.pool))
        assert_equal(kept.run(x), got)


@dtypes
@torch.no_grad()
def test_nan_and_infinities(dtype: torch.dtype) -> None:
    x, params, spec = frozen(STEM).build(dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in ((0, 0, 0, 0), (1, 2, 20, 17), (0, 1, 10, 9)):
            wild = x.clone()
            wild[place] = bad
            assert_equal(
                functional.residual_block_max_pool2d(wild, params, spec, 3, 2, 1), in_two(wild, params, spec, 3, 2, 1)
            )
            # in fp64: in bfloat16 oneDNN's kernel for contiguous tensors makes NaN of some infinities (AVX512-BF16)
            eager = in_eager(wild.double(), to_double(params), spec, (3, 2, 1))
            got = functional.residual_block_max_pool2d(wild, params, spec, 3, 2, 1)
            assert torch.equal(got.isnan(), eager.isnan()) and torch.equal(got.isposinf(), eager.isposinf())
    params.stages[0].weight[5, 1, 3, 3] = torch.nan
    got = functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1)
    assert got[:, 5].isnan().all() and int(got.isnan().sum()) == got[:, 5].numel()


def trained(case: Case, dtype: torch.dtype, fused: bool) -> dict[str, Tensor | None]:
    x, params, spec = case.build(dtype, torch.channels_last)
    x.requires_grad_()
    params = leaves(params)
    out = (functional.residual_block_max_pool2d if fused else in_two)(x, params, spec, 3, 2, 1)
    out.float().square().sum().backward()
    named = named_tensors(params)
    return {"out": out.detach(), "x": x.grad} | {n: t if is_buffer(n) else t.grad for n, t in named.items()}


@dtypes
@pytest.mark.parametrize("batch_stats", [True, False], ids=["training", "frozen"])
def test_training_and_autograd(batch_stats: bool, dtype: torch.dtype) -> None:
    case = STEM if batch_stats else frozen(STEM)
    got, expected = trained(case, dtype, True), trained(case, dtype, False)
    for name, value in expected.items():
        assert value is None or torch.equal(got[name], value), name  # type: ignore[arg-type]
    assert got["x"] is not None and got["stages.0.weight"] is not None


@torch.no_grad()
def test_training_without_autograd_updates_statistics() -> None:
    runs = []
    for compute in (functional.residual_block_max_pool2d, in_two):
        x, params, spec = STEM.build(torch.float32)
        runs.append((compute(x, params, spec, 3, 2, 1), params.stages[0]))
    (got, ours), (expected, theirs) = runs
    assert torch.equal(got, expected) and torch.equal(ours.running_mean, theirs.running_mean)  # type: ignore[arg-type]
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 4  # type: ignore[arg-type]


@formats
@torch.no_grad()
def test_autocast(memory_format: torch.memory_format) -> None:
    x, params, spec = frozen(STEM).build(torch.float32, memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        got = functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1)
        assert_equal(got, in_two(x, params, spec, 3, 2, 1))
    assert got.dtype == torch.bfloat16


@torch.no_grad()
def test_compiled() -> None:
    x, params, spec = frozen(STEM).build(torch.float32)
    weights, expected = params.stages[0], functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1)

    def compute(x: Tensor) -> Tensor:
        return functional.residual_block_max_pool2d(x, BlockParams((weights,)), spec, 3, 2, 1)

    got = torch.compile(compute, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_never_stale() -> None:
    """Pooled and not pooled in turns, with weights that change between."""
    x, params, spec = frozen(STEM).build(torch.float32)
    for _ in range(3):
        for window in ((3, 2, 1), (2, 2, 0)):
            got = functional.residual_block_max_pool2d(x, params, spec, *window)
            assert_equal(got, in_two(x, copy.deepcopy(params), spec, *window))
            params.stages[0].weight.mul_(-1.5)
            params.stages[0].running_mean.data.add_(0.5)  # type: ignore[union-attr]


def test_a_skip_path_and_an_empty_batch() -> None:
    x, params, spec = frozen(block(2, channels=4, width=4)).build(torch.float32)
    with torch.no_grad():
        got = functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1)
        assert_equal(got, in_two(x, params, spec, 3, 2, 1))
        x, params, spec = frozen(STEM).build(torch.float32)
        assert functional.residual_block_max_pool2d(x[:0], params, spec, 3, 2, 1).shape == (0, 16, 6, 5)


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ((0, 2, 1), r"kernel_size=0.*1 to 15"),
        ((16, 2, 1), r"kernel_size=16.*1 to 15"),
        ((3, 0, 1), r"stride=0.*positive"),
        ((3, 2, 2), r"padding=2.*half the kernel"),
        ((3, 2, -1), r"padding=-1"),
        ((15, 2, 0), r"15x15.*\(2, 16, 11, 9\)"),
    ],
)
def test_bad_windows(window: tuple[int, int, int], words: str) -> None:
    """The errors of max_pool2d, in evaluation as in training."""
    for case in (STEM, frozen(STEM)):
        x, params, spec = case.build(torch.float32)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises(ValueError, match=words):
                functional.residual_block_max_pool2d(x, params, spec, *window)


@torch.no_grad()
def test_other_errors() -> None:
    x, params, spec = frozen(STEM).build(torch.float32)
    with pytest.raises(ValueError, match=r"'nothing'.*'native'"):
        functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1, backend="nothing")
    with pytest.raises(BackendError, match=r"native.*torch\.func"):
        torch.func.vmap(lambda t: functional.residual_block_max_pool2d(t, params, spec, 3, 2, 1, backend="native"))(
            x[None]
        )
    with pytest.raises((ValueError, RuntimeError), match="channels"):
        functional.residual_block_max_pool2d(x[:, :2], params, spec, 3, 2, 1)
    eager = functional.residual_block_max_pool2d(x, params, spec, 3, 2, 1, backend="eager")
    assert_equal(eager, in_eager(x, params, spec, (3, 2, 1)))
