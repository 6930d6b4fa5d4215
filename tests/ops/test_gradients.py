"""Gradients in fp64: against finite differences, and over a wide family against autograd through the reference."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.blocks import Case, block, bottleneck, frozen
from support.engine_blocks import chain
from support.matrix import BACKENDS, FORMATS, family
from support.named_tensors import is_buffer, leaves, named_tensors
from support.random_blocks import EXACT, cases
from support.runs import run, run_exact
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_fused import functional
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec, StageSpec

backends = pytest.mark.parametrize("backend", BACKENDS)

SMALL = {"channels": 2, "width": 2, "size": (3, 4)}
CASES = {
    "chain of 1, no skip": block(1, "none", **SMALL),
    "chain of 2, no skip": block(2, "none", **SMALL),
    "chain of 3, no skip": block(3, "none", **SMALL),
    "chain of 1, identity": block(1, "identity", **SMALL),
    "chain of 2, identity": block(2, "identity", **SMALL),
    "chain of 3, identity": block(3, "identity", **SMALL),
    "chain of 1, projection": block(1, "projection", out_channels=3, **SMALL),
    "chain of 2, projection, stride": block(
        2, "projection", out_channels=3, stride=2, channels=2, width=2, size=(5, 4)
    ),
    "chain of 3, projection": block(3, "projection", out_channels=3, **SMALL),
    "bottleneck, strides": bottleneck("projection", channels=3, width=2, size=(3, 4)),
    "bottleneck, strides, branch": bottleneck("projection", "branch", channels=3, width=2, size=(3, 4)),
    "bottleneck, strides, frozen norms": frozen(bottleneck("projection", channels=3, width=2, size=(3, 4))),
    "chain of 2, strides at its end": block(
        2, "projection", stride=2, strides_at=1, out_channels=3, channels=2, width=2, size=(3, 4)
    ),
    "chain of 2, strides at its end, no skip": block(2, "none", stride=(1, 2), strides_at=1, **SMALL),
    "inverted residual, strides": chain(
        2,
        ((1, 1), 4, StageSpec()),
        ((3, 3), 4, StageSpec(2, 1, groups=4)),
        ((1, 1), 3, StageSpec(act="identity")),
        size=(3, 4),
    ),
    "uneven stride": block(2, "projection", stride=(1, 3), channels=2, width=2, size=(3, 7)),
    "groups": block(2, channels=4, width=4, groups=2, size=(3, 3)),
    "depthwise": block(2, channels=3, width=3, groups=3, size=(3, 4)),
    "dilation": block(2, dilation=2, channels=2, width=2, size=(4, 5)),
    "uneven dilation": block(2, dilation=(1, 2), channels=2, width=2, size=(3, 5)),
    "uneven padding": Case(
        BlockSpec((StageSpec(2, (0, 2), (1, 2)), StageSpec(1, (2, 1))), "none"), 2, (2, 3), ((2, 3), (3, 2)), (5, 4)
    ),
    "padding as wide as the kernel": Case(
        BlockSpec((StageSpec(), StageSpec(padding=3)), "none"), 2, (2, 2), ((1, 1), (3, 3)), (3, 2)
    ),
    "1x1 kernels": block(3, kernel=1, **SMALL),
    "convolution bias": block(2, "projection", bias=True, **SMALL),
    "fixed scales": block(2, branch_scale="float", skip_scale="float", **SMALL),
    "0-d scales": block(2, branch_scale="0-d", skip_scale="0-d", **SMALL),
    "one-element scales": block(2, "projection", branch_scale="[1]", skip_scale="[1]", **SMALL),
    "scales per channel": block(2, branch_scale="[C]", skip_scale="[C,1,1]", **SMALL),
    "branch scale, no skip": block(2, "none", branch_scale="[C]", **SMALL),
    "skip scale of a projection": block(1, "projection", skip_scale="[C]", **SMALL),
    "frozen norms": block(3, "projection", batch_stats=False, **SMALL),
    "first norm frozen": block(2, "projection", batch_stats=(False, True, True), **SMALL),
    "last norm frozen": block(2, "projection", batch_stats=(True, False, True), **SMALL),
    "projection's norm frozen": block(2, "projection", batch_stats=(True, True, False), **SMALL),
    "no affine": block(2, "projection", affine=False, **SMALL),
    "no norm": block(2, "projection", norm=False, bias=True, **SMALL),
    "no norm, scales": block(2, norm=False, branch_scale="[C]", skip_scale="0-d", **SMALL),
    "only the last stage without norm": Case(
        BlockSpec((StageSpec(padding=1), StageSpec(padding=1, norm=False)), "identity"),
        2,
        (3, 2),
        ((3, 3),) * 2,
        (3, 4),
    ),
    "no activation": block(2, act="identity", **SMALL),
    "no tracking": block(2, tracked=False, **SMALL),
    "large eps": block(2, eps=0.5, **SMALL),
    "batch of 1": block(2, batch=1, **SMALL),
}
CASES |= {
    f"pre-activation, {name}": case
    for name, case in {
        "chain of 1": block(1, order="pre", **SMALL),
        "chain of 2": block(2, order="pre", **SMALL),
        "chain of 3, projection, stride": block(
            3, "projection", order="pre", out_channels=3, stride=2, channels=2, width=2, size=(5, 4)
        ),
        "bottleneck, strides": bottleneck("projection", "pre", channels=3, width=2, size=(3, 4)),
        "chain of 2, strides at its end": block(
            2, "projection", order="pre", out_channels=3, stride=2, strides_at=1, channels=2, width=2, size=(3, 4)
        ),
        "no skip": block(2, "none", order="pre", **SMALL),
        "frozen first norm": block(2, order="pre", batch_stats=(False, True), **SMALL),
        "frozen norms, projection": block(2, "projection", order="pre", batch_stats=False, **SMALL),
        "bias": block(2, "projection", order="pre", bias=True, **SMALL),
        "scales": block(2, order="pre", branch_scale="[C]", skip_scale="0-d", **SMALL),
        "no affine, groups": block(2, order="pre", affine=False, channels=4, width=4, groups=2, size=(3, 3)),
        "no activation": block(2, order="pre", act="identity", **SMALL),
        "no norm": block(2, "projection", order="pre", norm=False, **SMALL),
    }.items()
}


class KinkDistance(TorchFunctionMode):
    """The smallest magnitude that reaches a ReLU in plain PyTorch; finite differences must not cross zero."""

    def __init__(self) -> None:
        super().__init__()
        self.smallest = float("inf")

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.relu:
            self.smallest = min(self.smallest, float(args[0].detach().abs().min()))
        return func(*args, **(kwargs or {}))


def away_from_kinks(case: Case, memory_format: torch.memory_format) -> tuple[Tensor, BlockParams, BlockSpec]:
    """The case from the first seed that leaves every ReLU's input outside (-1e-4, 1e-4)."""
    for seed in count():
        x, params, spec = case.build(torch.float64, memory_format, seed)
        with KinkDistance() as distance:
            run(x, params, spec, "eager")
        if distance.smallest > 1e-4:
            return x, params, spec
    raise AssertionError


@backends
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", CASES)
def test_finite_differences(name: str, memory: str, backend: str) -> None:
    memory_format = FORMATS[list(CASES).index(name) % 2 ^ (memory == "low")]  # both formats over the list
    x, params, spec = away_from_kinks(CASES[name], memory_format)
    spec = spec.with_memory(memory)  # type: ignore[arg-type]
    names = [n for n in named_tensors(params) if not is_buffer(n)]
    inputs = leaves(params)

    def compute(x: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        fresh = map_tensors(inputs, lambda n, t: given[n] if n in given else t.clone())
        return functional.residual_block(x, fresh, spec, backend=backend)

    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(compute, (leaf, *(named_tensors(inputs)[n] for n in names)), atol=1e-6, rtol=1e-4)


@backends
@given(case=cases(**EXACT), seed=st.integers(0, 3), x_last=st.booleans(), dout_last=st.booleans())
@family
def test_family_agrees_with_the_reference(case: Case, seed: int, x_last: bool, dout_last: bool, backend: str) -> None:
    """Outputs, gradients and running statistics to 1e-10: rounding leaves a wrong formula no room there."""
    x, params, spec = case.build(torch.float64, FORMATS[x_last], seed)
    dout = case.upstream(seed=seed).contiguous(memory_format=FORMATS[dout_last])
    got, exact = run(x, params, spec, backend, dout), run_exact(x, params, spec, dout)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@backends
@given(case=cases(**EXACT), seed=st.integers(0, 3), wanted=st.lists(st.booleans(), min_size=31, max_size=31))
@family
def test_any_parameters_may_be_frozen(case: Case, seed: int, wanted: list[bool], backend: str) -> None:
    """The other gradients are the reference's; which are wanted decides on what forward keeps."""
    x, params, spec = case.build(torch.float64, seed=seed)
    choice = iter(wanted)
    chosen = {n for n in named_tensors(params) if not is_buffer(n) and next(choice)}
    results = []
    for each in (backend, "eager"):
        leaf, tensors = x.detach().requires_grad_(wanted[-1] or not chosen), leaves(params, lambda name: name in chosen)
        inputs = [t for t in (leaf, *named_tensors(tensors).values()) if t.requires_grad]
        out = functional.residual_block(leaf, tensors, spec, backend=each)
        results.append(torch.autograd.grad(out, inputs, case.upstream(seed=seed)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
