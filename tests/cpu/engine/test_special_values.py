"""What is not finite comes out where eager has it, and nothing of an earlier call leaks into a later one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.blocks import Case, block, bottleneck, frozen
from support.engine_blocks import TABLE, chain
from support.engine_runs import in_eager, on_engine, threads
from support.equivalence import relative_error
from support.matrix import FORMATS
from support.named_tensors import named_tensors, to_double
from torch import Tensor

from resnet_fused import functional
from resnet_fused.spec import StageSpec

NAN, INF = float("nan"), float("inf")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
SAME = StageSpec(1, 1, batch_stats=False)

# by how the engine lays the first input out
LAYOUTS: dict[str, Case] = {
    "pixels": bottleneck("identity", channels=32, width=32, size=(3, 6)),
    "pixels that are copied": bottleneck("projection", channels=5, width=4, size=(3, 4)),
    "planes": block(2, channels=17, width=8, size=(4, 3)),
    "patches": block(2, channels=32, width=40, size=(5, 4)),
    # its infinities keep their signs, which others' do not survive
    "patches alone": chain(32, ((3, 3), 40, replace(SAME, act="identity")), size=(5, 4)),
    "planes of a stride": block(2, "projection", channels=17, width=8, out_channels=6, stride=2, size=(5, 4)),
    "columns": chain(8, ((1, 1), 8, StageSpec(2)), ((3, 3), 4, SAME), size=(4, 5)),
    "folded": chain(3, ((3, 3), 8, StageSpec(2, 1)), ((1, 1), 8, StageSpec()), size=(5, 6)),
    "groups": chain(8, ((3, 3), 8, StageSpec(1, 1, groups=4)), ((1, 1), 16, StageSpec(groups=2)), size=(3, 4)),
    "groups behind pixels": chain(32, ((1, 1), 64, StageSpec()), ((3, 3), 64, StageSpec(1, 1, groups=16)), size=(4, 4)),
    "pre": block(2, order="pre", channels=5, width=6, size=(3, 4)),
    "branch": block(2, order="branch", channels=5, width=6, size=(3, 4), act="silu"),
}


def assert_same_values_are_lost(got: Tensor, eager: Tensor, what: str) -> None:
    for lost in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(lost(got), lost(eager)), f"{what}: other values are lost than in eager"


@dtypes
@formats
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_at_every_position(name: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """One image of three at a time; infinities of both signs behind positive and negative weights."""
    case = replace(frozen(LAYOUTS[name]), batch=3)
    x, params, spec = case.build(dtype, memory_format)
    on_engine(x, params, spec)  # finite: this is the engine's
    height, width = case.size
    for position in range(height * width):
        for bad in (NAN, INF, -INF):
            wild = x.clone(memory_format=torch.preserve_format)
            wild[position % 3, position % case.channels, position // width, position % width] = bad
            got = functional.residual_block(wild, params, spec)
            assert_same_values_are_lost(got, in_eager(wild, params, spec), f"{bad} at {position}")


@dtypes
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_in_every_parameter(name: str, dtype: torch.dtype) -> None:
    case = replace(frozen(LAYOUTS[name]), bias=True)
    for part in named_tensors(case.build(dtype)[1]):
        if part.endswith("num_batches_tracked"):
            continue
        for bad in (NAN, INF):
            x, params, spec = case.build(dtype, torch.channels_last)
            functional.residual_block(x, params, spec)  # finite, and kept
            named_tensors(params)[part][(-1,) * named_tensors(params)[part].dim()] = bad
            got = functional.residual_block(x, params, spec)
            assert_same_values_are_lost(got, in_eager(x, params, spec), f"{bad} in {part}")


@dtypes
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("order", ["post", "pre", "branch"])
@torch.no_grad()
def test_in_scales(order: str, bad: float, dtype: torch.dtype) -> None:
    case = frozen(bottleneck("identity", order, channels=8, width=8, branch_scale="[C]", skip_scale="[C]"))
    for scale in ("branch_scale", "skip_scale"):
        x, params, spec = case.build(dtype)
        getattr(params, scale)[5] = bad
        got = functional.residual_block(x, params, spec)
        assert_same_values_are_lost(got, in_eager(x, params, spec), f"{bad} in {scale}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_group_does_not_see_another(dtype: torch.dtype) -> None:
    """A value between the convolutions that is not finite, although x and the parameters are."""
    case = frozen(LAYOUTS["groups behind pixels"])
    x, params, spec = case.build(dtype, torch.channels_last)
    params.stages[0].weight[3] = torch.finfo(dtype).max / 4  # of one channel of one group
    got, eager = functional.residual_block(x.abs() + 8, params, spec), in_eager(x.abs() + 8, params, spec)
    assert not eager.isfinite().all() and eager[:, 4:].isfinite().all()
    assert_same_values_are_lost(got, eager, "infinity in one group")


@torch.no_grad()
def test_between_convolutions_float16_does_not_overflow() -> None:
    """There the engine has floats: where eager has infinities, it has what float64 has."""
    x, params, spec = frozen(LAYOUTS["groups behind pixels"]).build(torch.float16, torch.channels_last)
    params.stages[0].weight[3] = 16000.0
    params.stages[1].weight[:4] *= 2.0**-10
    x = x.abs() + 8
    got, eager = functional.residual_block(x, params, spec), in_eager(x, params, spec)
    exact = in_eager(x.double(), to_double(params), spec)
    assert not eager.isfinite().all() and exact.abs().max() < torch.finfo(torch.float16).max
    assert relative_error(got, exact) < 2 * torch.finfo(torch.float16).eps


@torch.no_grad()
def test_weights_beyond_float16() -> None:
    """Under autocast they are infinite in float16, as is what eager makes of them."""
    x, params, spec = frozen(LAYOUTS["pixels that are copied"]).build(torch.float32, torch.channels_last)
    params.stages[0].weight[3, 2] = 70000.0
    with torch.autocast("cpu", torch.float16):
        got, eager = functional.residual_block(x, params, spec), in_eager(x, params, spec)
    assert got.dtype == torch.float16 and not eager.isfinite().all()
    assert_same_values_are_lost(got, eager, "a weight of 70000")


@dtypes
@pytest.mark.parametrize("count", [1, 2, 7])
@torch.no_grad()
def test_nothing_leaks_from_earlier_calls(count: int, dtype: torch.dtype) -> None:
    """Every thread's scratch and the memory of results full of NaN: of this size, of larger ones."""
    names = [name for name in TABLE if ", " not in name and "bands" not in name]
    blocks = {name: replace(TABLE[name].case, batch=3).build(dtype, torch.channels_last) for name in names}
    expected = {name: on_engine(*blocks[name], TABLE[name].pool) for name in names}
    wide, params, spec = replace(TABLE["bands"].case, batch=8).build(dtype, torch.channels_last)
    with threads(count):
        for name, (x, own, its) in blocks.items():
            functional.residual_block(wide.fill_(NAN), params, spec)
            results = [functional.residual_block(torch.full_like(x, NAN), own, its) for _ in range(2)]
            del results
            got = on_engine(x, own, its, TABLE[name].pool)
            assert torch.equal(got, expected[name]), name
