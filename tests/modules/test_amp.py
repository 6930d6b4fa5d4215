"""Mixed precision as it is used: GradScaler, dtypes that differ within a model, autocast within autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.equivalence import assert_as_accurate
from support.small_net import picture, small_net
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse


def float_norms(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """16-bit convolutions with float32 norms."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prepare", [lambda model, dtype: model.to(dtype), float_norms], ids=["pure", "float norms"])
def test_16_bit_models(prepare: Callable[[nn.Module, torch.dtype], nn.Module], dtype: torch.dtype) -> None:
    assert_trains_as_eager(prepare(small_net(), dtype), picture(16).to(dtype))


def test_autocast_to_float16() -> None:
    assert_trains_as_eager(small_net(), picture(16), autocast=torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_reach_the_graph_without_casts(dtype: torch.dtype) -> None:
    fused = fuse(small_net())[1]
    with torch.autocast("cpu", dtype):
        out = fused(torch.ones(2, 8, 6, 5, requires_grad=True))
    nodes = [node for node, _ in out.grad_fn.next_functions if node is not None]
    convolutions = {id(p) for p in fused.parameters() if p.dim() == 4}
    assert convolutions and convolutions <= {id(getattr(node, "variable", None)) for node in nodes}


def test_weights_may_change_between_forward_and_backward() -> None:
    """As in eager, whose casts are kept as well: the gradients are those of the weights that forward read."""
    gradients = []
    for changes in (False, True):
        fused = fuse(small_net())[1]
        x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = fused(x)
        if changes:
            with torch.no_grad():
                for parameter in fused.parameters():
                    parameter.copy_(-parameter) if parameter.dim() == 4 else None
        out.float().square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in fused.parameters())])
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("wanted", ["all", "weight"])
def test_a_second_derivative_of_float32_weights_says_what_to_do(wanted: str) -> None:
    """Also where nothing but a weight, of which backward reads a rounded copy, could be differentiated again."""
    fused = fuse(small_net())[1]
    weight = next(p for p in fused.parameters() if p.dim() == 4)
    for parameter in fused.parameters():
        parameter.requires_grad_(wanted == "all" or parameter is weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused(torch.ones(2, 8, 6, 5))
    (gradient,) = torch.autograd.grad(out.float().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative of residual_block"):
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.mark.parametrize("overflows", [False, True])
def test_grad_scaler_skips_the_steps_that_eager_skips(overflows: bool) -> None:
    """An infinite gradient: no weight moves, the scale halves, and the statistics have seen the batch."""
    eager = small_net()
    scale = 2.0**30 if overflows else 2.0**4
    results = []
    for model in (eager, fuse(copy.deepcopy(eager))):
        before = copy.deepcopy(dict(model.named_parameters()))
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(picture(16)).float().square().mean()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        moved = [not torch.equal(before[name], parameter) for name, parameter in model.named_parameters()]
        results.append((scaler.get_scale(), moved, dict(model.named_buffers())))
    (scale_eager, moved_eager, buffers), (scale_fused, moved_fused, ours) = results
    assert scale_fused == scale_eager == (scale / 4 if overflows else scale)
    assert moved_fused == moved_eager and any(moved_eager) is not overflows
    for name, value in buffers.items():
        torch.testing.assert_close(ours[name], value, rtol=5e-3, atol=5e-3)  # float16's convolutions


def test_autocast_switched_off_within() -> None:
    """Under ``autocast(enabled=False)`` a block computes in float32, whatever is around it."""
    eager = small_net().eval()
    fused = fuse(copy.deepcopy(eager))

    def run(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            model[1](torch.ones(2, 8, 4, 4))  # type: ignore[index]
            with torch.autocast("cpu", enabled=False):
                return model(picture(16))

    got, expected = run(fused), run(eager)
    assert got.dtype == torch.float32
    assert_as_accurate("output", got, expected, copy.deepcopy(eager).double()(picture(16).double()))


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_autocasts_cache_shows_no_old_weights(cache: bool) -> None:
    """Weights that change within one autocast region, where casts of them are cached."""
    fused = fuse(small_net()).eval()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        before = fused(picture(16))
        fused[0].conv1.weight.neg_()  # type: ignore[operator, union-attr]
        got = fused(picture(16))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(got, copy.deepcopy(fused)(picture(16)), rtol=0, atol=0)
    assert not torch.equal(got, before)


@pytest.mark.parametrize("cache", [True, False])
def test_a_block_called_twice_in_a_region(cache: bool) -> None:
    """Both calls' gradients reach the one float32 weight, through a cached cast or two casts."""
    eager = small_net()[1:2]
    results: list[dict[str, Any]] = []
    for model in (fuse(copy.deepcopy(eager)), eager, copy.deepcopy(eager).double()):
        x = torch.randn(4, 8, 6, 5, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
        exact = x.dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact, cache_enabled=cache):
            model(model(x)).square().mean().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in results[0].items():
        assert_as_accurate(name, value, results[1][name], results[2][name], factor=3)
    assert explain(fuse(copy.deepcopy(eager)))[0].backend == "native"
