"""`verify` passes what is right, catches what is wrong, and leaves the model alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models, reference
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec
from resnet_fused.verification import LIMIT, Comparison

Formula = Callable[[Tensor, BlockParams, BlockSpec], Tensor]


def small_net() -> nn.Module:
    """Two blocks of 8 channels on 16x16 pictures; norms with values of their own."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(3, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    net = nn.Sequential(models.BasicBlock(3, 8, 2, downsample), models.BasicBlock(8, 8), nn.Flatten())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net


def picture() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_the_formula_passes(dtype: torch.dtype | None, train: bool) -> None:
    report = resnet_fused.verify(small_net(), picture(), dtype=dtype, train=train, backend="eager")
    assert report.ok, report.table()
    assert [block.name for block in report.blocks] == ["0", "1"]
    compared = {quantity.name for quantity in report.blocks[0].quantities}
    assert {"output", "input gradient", "gradient of conv1.weight", "gradient of downsample.1.bias"} <= compared
    assert {"bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"} <= compared
    assert ("output without autograd" in compared) is not train


def test_the_model_is_left_alone() -> None:
    net = small_net().eval()
    before = copy.deepcopy(net.state_dict())
    resnet_fused.verify(net, picture(), backend="eager")
    assert not net.training and type(net[0]) is models.BasicBlock  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def wrong_stride(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    """Right in shape: the stride is taken by the second convolution instead of the first."""
    first, second = spec.stages
    stages = (replace(first, stride=second.stride), replace(second, stride=first.stride))
    return right(x, params, replace(spec, stages=stages))


def scaled_branch(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return right(x, replace(params, branch_scale=1.0 + 1e-4), spec)


def other_epsilon(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return right(x, params, replace(spec, stages=tuple(replace(stage, eps=1e-3) for stage in spec.stages)))


def one_pixel(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    out = right(x, params, spec)
    return out + torch.zeros_like(out).index_put_((torch.tensor(0),) * 4, torch.tensor(1e-2))


def half_gradient(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    out = right(x, params, spec)
    return out.detach() + 0.5 * (out - out.detach())


def no_statistics(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    stages = tuple(replace(stage, running_mean=None, running_var=None) for stage in params.stages)
    return right(x, replace(params, stages=stages), spec)


def not_a_number(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return right(x, params, spec) * float("nan")


right: Formula = reference.residual_block
WRONG = [wrong_stride, scaled_branch, other_epsilon, one_pixel, half_gradient, no_statistics, not_a_number]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_block_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Formula) -> None:
    monkeypatch.setattr(reference, "residual_block", wrong)
    report = resnet_fused.verify(small_net(), picture(), backend="eager")
    assert not report.ok
    assert report.blocks[0].worst.ratio > LIMIT
    assert "WRONG" in report.table()


def test_the_worst_quantity_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_block", no_statistics)
    report = resnet_fused.verify(small_net(), picture(), backend="eager")
    assert all(block.worst.name.split(".")[-1] in ("running_mean", "running_var") for block in report.blocks)


def test_json_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_block", not_a_number)

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(resnet_fused.verify(small_net(), picture(), backend="eager").to_json(), parse_constant=refuse)
    assert report["ok"] is False and len(report["blocks"]) == 2
    outputs = [q for q in report["whole"]["quantities"] if q["name"] == "output"]
    assert [q["ratio"] for q in outputs] == [None]


def test_the_stem_is_compared() -> None:
    torch.manual_seed(0)
    report = resnet_fused.verify(models.resnet18(fused=True), torch.randn(2, 3, 32, 32), train=False, backend="eager")
    assert report.ok, report.table()
    assert [block.name for block in report.blocks][:2] == ["stem", "layer1.0"]


def test_rounding_at_the_kink_is_no_fault() -> None:
    """A mask that flips under rounding moves a gradient by far more than eager's error, and is excused."""

    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> Tensor:
            shift = 0.0 if x.dtype == torch.float64 else self.shift
            return torch.relu(x * 3.1 + shift)

    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    x[0, 0, 0, 0] = 1e-9
    x[0, 0, 0, 1] = 0.25

    def outcome(shift: float) -> float:
        blocks, _ = Comparison(train=True).compare(
            nn.Sequential(Shifted(1e-7)), nn.Sequential(Shifted(shift)), ["0"], x
        )
        return {q.name: q for q in blocks[0].quantities}["input gradient"].ratio

    assert outcome(-1e-7) <= LIMIT
    assert outcome(-2.0) > LIMIT


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    resnet_fused.verify(small_net(), picture(), backend="eager", progress=lambda *step: seen.append(step))
    assert [step[1:] for step in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_refusals_say_what_is_accepted() -> None:
    net, x = small_net(), picture()
    with pytest.raises(ValueError, match="accepted: None, float32, bfloat16 or float16"):
        resnet_fused.verify(net, x, dtype=torch.float64)
    with pytest.raises(ValueError, match="below float64"):
        resnet_fused.verify(net.double(), x.double())
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        resnet_fused.verify(small_net(), x, backend="fast")
    with pytest.raises(ValueError, match="explain"):
        resnet_fused.verify(nn.Sequential(nn.Conv2d(3, 3, 1)), x)
