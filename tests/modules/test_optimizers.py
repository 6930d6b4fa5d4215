"""Evaluation sees the weights that optimizers and averages have written, though none of them says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.small_net import picture, small_net
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from resnet_fused import fuse

CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # float64, after steps that amplify its rounding


class LayerwiseScaled:
    """A step as LAMB takes it, written through ``.data``; no torch.optim.Optimizer, so nobody is told of it."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def step(self) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            update = parameter.grad / (parameter.grad.norm() + 1e-6)
            parameter.data.add_(update * parameter.data.norm(), alpha=-0.05)


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Any]] = {
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, 0.01, foreach=True),
    "SGD, fused": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True),
    "SGD, foreach": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, foreach=True),
    "layer-wise, through .data": LayerwiseScaled,
}


def evaluate(model: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return model(picture().double())


def train(model: nn.Module, optimizer: Any) -> None:
    model.zero_grad()
    model(picture().double()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["frozen", "training"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluation_after_each_step(name: str, mode: str) -> None:
    """frozen: the norms stay in evaluation, so no change of mode drops what was folded."""
    eager = small_net().double().eval()
    fused = fuse(copy.deepcopy(eager))
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (eager, fused)]
    seen = [evaluate(fused)]
    for _ in range(3):
        for model, optimizer in zip((eager, fused), optimizers, strict=True):
            train(model.train(mode == "training"), optimizer)
            model.eval()
        seen.append(evaluate(fused))
        torch.testing.assert_close(seen[-1], evaluate(eager), **CLOSE)
        assert not torch.allclose(seen[-1], seen[-2])


@pytest.mark.parametrize("name", ["AdamW, fused", "layer-wise, through .data"])
def test_a_compiled_evaluation_sees_them_too(name: str) -> None:
    fused = fuse(small_net().double()).eval()
    torch.compiler.reset()
    run, optimizer = torch.compile(fused, backend="aot_eager", fullgraph=True), OPTIMIZERS[name](fused.parameters())
    before = evaluate(run)
    train(fused, optimizer)
    torch.testing.assert_close(evaluate(run), evaluate(copy.deepcopy(fused)), rtol=0, atol=0)
    assert not torch.allclose(evaluate(run), before)
    torch.compiler.reset()


@pytest.mark.parametrize("buffers", [False, True])
def test_an_exponential_average(buffers: bool) -> None:
    """`AveragedModel` writes its copy's weights with foreach operations."""
    eager = small_net().double()
    runs = []
    for model in (eager, fuse(copy.deepcopy(eager))):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers).eval()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        outputs = [evaluate(average)]
        for _ in range(3):
            train(model, optimizer)
            average.update_parameters(model)
            outputs.append(evaluate(average))
        runs.append(torch.stack(outputs))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    assert all(not torch.allclose(a, b) for a, b in zip(runs[1][:-1], runs[1][1:], strict=True))


def test_stochastic_weight_averaging() -> None:
    """`update_bn` sets the norms' momentum aside and gathers their statistics anew."""
    eager = small_net().double()
    runs = []
    for model in (eager, fuse(copy.deepcopy(eager))):
        average, optimizer = AveragedModel(model), torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(2):
            train(model, optimizer)
            average.update_parameters(model)
        before = evaluate(average.eval())
        average.train()
        update_bn([picture().double()[:3], picture().double()[1:]], average)
        runs.append((before, evaluate(average.eval()), dict(average.state_dict())))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    assert not torch.allclose(runs[1][0], runs[1][1])
