"""A prepared block never outlives what it was prepared from; under autocast it is packed straight from float32.

tests/ops/test_evaluation_state.py has the many ways to write a tensor; here they meet the engine in all its dtypes.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.blocks import frozen
from support.engine_blocks import TABLE
from support.engine_runs import in_eager, on_engine
from support.equivalence import FLOOR_ULPS, assert_as_accurate, relative_error
from support.named_tensors import named_tensors, to_double
from torch import Tensor, nn

from resnet_fused import functional, fuse
from resnet_fused.backends import prepared
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
Block = tuple[Tensor, BlockParams, BlockSpec]


def fresh(block: Block) -> Tensor:
    """By parameters that have never been seen."""
    x, params, spec = block
    return on_engine(x, map_tensors(params, lambda _, t: t.clone()), spec)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.mul_(1.5),
    "copied": lambda t: t.copy_(t * 0.5),
    "filled by foreach": lambda t: torch._foreach_mul_([t], 1.25),
    "through data": lambda t: t.data.mul_(1.5),
    "data replaced": lambda t: setattr(t, "data", t.data * 1.5),
    "a slice": lambda t: t[:1].mul_(3.0),
}


@dtypes
@pytest.mark.parametrize(
    "name", ["bottleneck with projection", "pre projection, scales", "prelu, branch", "groups of 4"]
)
@torch.no_grad()
def test_every_tensor_written(name: str, dtype: torch.dtype) -> None:
    for how, write in WRITES.items():
        x, params, spec = TABLE[name].case.build(dtype, torch.channels_last)
        for part, tensor in named_tensors(params).items():
            if part.endswith("num_batches_tracked") or (tensor.dim() == 0 and how == "a slice"):
                continue
            before = on_engine(x, params, spec)
            write(tensor)
            after = on_engine(x, params, spec)
            assert torch.equal(after, fresh((x, params, spec))), f"{part} {how}"
            assert not torch.equal(after, before), f"{part} {how}: nothing changed"


def module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    projection = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    made = Bottleneck(64, 32, 2, projection).eval()
    for child in made.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.running_mean, std=0.3)
    return made


def pictures() -> Tensor:
    return torch.randn(2, 64, 9, 7, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_fresh(fused: nn.Module, x: Tensor) -> None:
    """The same bits as a new module with these tensors."""
    other = fuse(module(seed=9)).to(next(fused.parameters()).dtype)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(fused(x), other(x)), "evaluation used weights of before"


def engine_ran(fused: nn.Module) -> bool:
    params = fused._fused_description.block.params  # type: ignore[union-attr]
    kept = params.kept.folded
    return kept is not None and isinstance(kept.made, prepared.Prepared)


@dtypes
def test_a_module_through_its_life(dtype: torch.dtype) -> None:
    fused, x = fuse(module()).to(dtype), pictures().to(dtype)
    assert_fresh(fused, x)
    assert engine_ran(fused)
    optimizer = torch.optim.SGD(fused.parameters(), 0.1)
    for evaluates in (True, False, True):
        fused.train(not evaluates)
        fused(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh(fused.eval(), x)
    fused.load_state_dict({name: t * 1.25 for name, t in fused.state_dict().items()})
    assert_fresh(fused, x)
    fused.train()
    with torch.no_grad():
        fused(x)  # statistics alone
    assert_fresh(fused.eval(), x)


@torch.no_grad()
def test_gathered_parameters_are_compared_whole() -> None:
    """A write to one value past the version counter, as fully_shard gathers weights; of others it is not noticed."""
    x = pictures()
    params, spec, _ = fuse(module()).fused_describe()  # type: ignore[misc, operator]
    gathered = replace(params, stages=tuple(replace(stage, gathered=True) for stage in params.stages))
    before = [on_engine(x, each, spec) for each in (params, gathered)]
    params.stages[1].weight.data[20, 7, 1, 1] += 1
    after = [on_engine(x, each, spec) for each in (params, gathered)]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    assert torch.equal(after[1], fresh((x, params, spec)))


def test_another_dtype_and_back() -> None:
    fused = fuse(module())
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.bfloat16):
        fused.to(dtype)
        assert_fresh(fused, pictures().to(dtype))


@dtypes
def test_copies_prepare_for_themselves(dtype: torch.dtype) -> None:
    fused, x = fuse(module()).to(dtype), pictures().to(dtype)
    assert_fresh(fused, x)
    with torch.no_grad():
        before = fused(x)
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(copied(x), before)
            for parameter in copied.parameters():
                parameter.mul_(1.5)
            assert_fresh(copied, x)
            assert torch.equal(fused(x), before)


@dtypes
@torch.no_grad()
def test_copied_parameters_hold_nothing_prepared(dtype: torch.dtype) -> None:
    x, params, spec = frozen(TABLE["basic"].case).build(dtype)
    out = on_engine(x, params, spec)
    assert params.kept.folded is not None
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert copied.kept.folded is None
        assert torch.equal(on_engine(x, copied, spec), out)


narrow_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@narrow_dtypes
@torch.no_grad()
def test_autocast_packs_from_float32(dtype: torch.dtype) -> None:
    """One rounding of a weight times its norm, where casting first rounds twice; float32 and back in turns."""
    blocks = [
        TABLE["bottleneck with projection"].case.build(torch.float32, torch.channels_last, seed) for seed in range(4)
    ]
    cast, pure, eager, exact = [], [], [], []
    for x, params, spec in blocks:
        wide = on_engine(x, params, spec)
        with torch.autocast("cpu", dtype):
            cast.append(functional.residual_block(x, params, spec))
            eager.append(in_eager(x, params, spec))
        assert cast[-1].dtype == dtype
        assert torch.equal(on_engine(x, params, spec), wide)
        narrow = map_tensors(params, lambda _, t: t.to(dtype) if t.is_floating_point() else t)
        pure.append(on_engine(x.to(dtype), narrow, spec))
        exact.append(in_eager(x.double(), to_double(params), spec))
    ours, expected = torch.stack(cast), torch.stack(exact)
    assert_as_accurate("autocast", ours, torch.stack(eager).to(dtype), expected)
    # a block in 16 bits has rounded the parameters, too
    assert relative_error(ours, expected) <= max(
        relative_error(torch.stack(pure), expected), FLOOR_ULPS * torch.finfo(dtype).eps
    )


@narrow_dtypes
@torch.no_grad()
def test_autocast_follows_the_float32_weights(dtype: torch.dtype) -> None:
    x, params, spec = TABLE["basic"].case.build(torch.float32, torch.channels_last)
    spec = BlockSpec(spec.stages, "none")
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            got = functional.residual_block(x, params, spec)
            copied = map_tensors(params, lambda _, t: t.clone())
            assert torch.equal(got, functional.residual_block(x, copied, spec))
        assert prepared.reason_against(x, params, spec) is None
        params.stages[0].weight.mul_(1.5)
        params.stages[1].running_var.data.mul_(2.0)  # type: ignore[union-attr]
