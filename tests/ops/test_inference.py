"""Evaluation: the folded path against fp64, and folded weights that notice every change of what they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import Case, block
from support.equivalence import assert_as_accurate
from support.matrix import BACKENDS, FORMATS, LOW_PRECISION, family
from support.named_tensors import named_tensors, to_double
from support.random_blocks import EVERY, cases
from torch import Tensor

from resnet_fused import functional
from resnet_fused.ops import reference
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec

backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.usefixtures("no_grad")

POST = block(3, "projection", channels=6, width=4, out_channels=8, stride=2, size=(9, 7), batch_stats=False, bias=True)
PRE = block(3, order="pre", channels=6, width=4, size=(9, 7), batch_stats=False, branch_scale="[C]", skip_scale="0-d")
SKIPLESS = block(2, "none", channels=6, size=(9, 7), batch_stats=False)


@pytest.fixture
def no_grad():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def frozen(case: Case) -> Case:
    """The case in evaluation mode."""
    spec = case.spec
    stages = tuple(replace(s, batch_stats=False) for s in spec.stages)
    projection = spec.projection and replace(spec.projection, batch_stats=False)
    return replace(case, spec=replace(spec, stages=stages, projection=projection))


def exactly(x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor:
    return reference.residual_block(x.double(), to_double(params), spec)


def assert_right(x: Tensor, params: BlockParams, spec: BlockSpec, backend: str) -> None:
    out = functional.residual_block(x, params, spec, backend=backend)
    torch.testing.assert_close(out.double(), exactly(x, params, spec), rtol=1e-10, atol=1e-10)


@backends
@given(case=cases(**EVERY), seed=st.integers(0, 3), last=st.booleans())
@family
def test_family_in_fp64(case: Case, seed: int, last: bool, backend: str) -> None:
    assert_right(*frozen(case).build(torch.float64, FORMATS[last], seed), backend)


@backends
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@given(case=cases(**EVERY), last=st.booleans(), float_norms=st.booleans())
@settings(family, max_examples=40)
def test_family(case: Case, last: bool, float_norms: bool, dtype: torch.dtype, backend: str) -> None:
    case, norm_dtype = frozen(case), torch.float32 if float_norms else None
    blocks = [case.build(dtype, FORMATS[last], seed, norm_dtype) for seed in range(8)]
    got = torch.stack([functional.residual_block(*b, backend=backend) for b in blocks])
    eager = torch.stack([functional.residual_block(*b, backend="eager") for b in blocks])
    assert_as_accurate("out", got, eager, torch.stack([exactly(*b) for b in blocks]))


@backends
@pytest.mark.parametrize("case", [POST, PRE, SKIPLESS], ids=["post", "pre", "skipless"])
@pytest.mark.parametrize("channels", [1, 5, 67])
def test_channels_off_the_vector_width(channels: int, case: Case, backend: str) -> None:
    last = {"post": 2 * channels, "pre": channels, "none": channels}[
        case.spec.order if case.spec.skip != "none" else "none"
    ]
    widths = (*[channels] * (len(case.spec.stages) - 1), *[last] * (1 + (case.spec.projection is not None)))
    assert_right(*replace(case, channels=channels, widths=widths).build(), backend)


def changes(t: Tensor) -> list[Callable[[], object]]:
    """Ways in which the values of a tensor change while the tensor stays."""
    return [lambda: t.mul_(1.5), lambda: t.copy_(t * 0.5), lambda: torch._foreach_add_([t], 0.25)]


@backends
@pytest.mark.parametrize("case", [POST, PRE, SKIPLESS], ids=["post", "pre", "skipless"])
def test_folded_weights_follow_every_tensor(case: Case, backend: str) -> None:
    x, params, spec = case.build()
    assert_right(x, params, spec, backend)
    for name, tensor in named_tensors(params).items():
        if name.endswith("num_batches_tracked"):
            continue
        for change in changes(tensor):
            before = functional.residual_block(x, params, spec, backend=backend)
            change()
            assert_right(x, params, spec, backend)
            after = functional.residual_block(x, params, spec, backend=backend)
            assert not torch.equal(before, after), f"the change of {name} was not seen"


@backends
def test_folded_weights_follow_a_training_step(backend: str) -> None:
    x, params, spec = POST.build()
    training = replace(
        spec,
        stages=tuple(replace(s, batch_stats=True) for s in spec.stages),
        projection=replace(spec.projection, batch_stats=True),  # type: ignore[type-var]
    )
    weights = [t for name, t in named_tensors(params).items() if t.is_floating_point() and "running" not in name]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for weight in weights:
        weight.requires_grad_()
    assert_right(x, params, spec, backend)
    with torch.enable_grad():
        functional.residual_block(x, params, training, backend=backend).square().sum().backward()
    optimizer.step()
    assert_right(x, params, spec, backend)


@backends
def test_folded_weights_follow_another_eps_scale_and_dtype(backend: str) -> None:
    x, params, spec = POST.build(torch.float32)
    for _ in range(2):
        wider = replace(spec, stages=tuple(replace(s, eps=0.5) for s in spec.stages))
        for each in (spec, wider):
            torch.testing.assert_close(
                functional.residual_block(x, params, each, backend=backend).double(),
                exactly(x, params, each),
                rtol=1e-5,
                atol=1e-5,
            )
        for factor in (0.5, torch.tensor(-2.0), torch.rand(8)):
            scaled = replace(params, branch_scale=factor, skip_scale=factor)
            torch.testing.assert_close(
                functional.residual_block(x, scaled, spec, backend=backend).double(),
                exactly(x, scaled, spec),
                rtol=1e-5,
                atol=1e-5,
            )
        assert_right(x.double(), to_double(params), spec, backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.residual_block(x, params, spec, backend=backend).dtype == torch.bfloat16


@backends
def test_folded_weights_of_shared_convolutions(backend: str) -> None:
    """Two blocks that share their convolutions and differ in their norms: each gets its own."""
    x, params, spec = POST.build()
    others = map_tensors(params, lambda name, t: t * 2 + 1 if "norm_" in name or "running" in name else t)
    for _ in range(2):
        assert_right(x, params, spec, backend)
        assert_right(x, others, spec, backend)


@backends
def test_new_tensor_at_an_old_address(backend: str) -> None:
    """A parameter freed and another allocated in its place has the old one's id, address and version."""
    case = block(1, "none", kernel=1, channels=2, out_channels=512, size=(2, 2), batch_stats=False)
    x, params, spec = case.build()
    stage, gammas = params.stages[0], torch.rand(40, 512, dtype=torch.float64)
    weight = gammas[0].clone()
    for gamma in gammas:
        weight = None
        weight = gamma.clone()
        assert_right(x, BlockParams((replace(stage, norm_weight=weight),)), spec, backend)


@backends
def test_evaluation_leaves_buffers_alone(backend: str) -> None:
    x, params, spec = POST.build()
    before = {name: t.clone() for name, t in named_tensors(params).items()}
    functional.residual_block(x, params, spec, backend=backend)
    for name, t in named_tensors(params).items():
        assert torch.equal(t, before[name]) and t._version == 0, name


@backends
@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_is_no_view_of_its_input(memory_format: torch.memory_format, backend: str) -> None:
    x, params, spec = PRE.build(torch.float32, memory_format)
    out = functional.residual_block(x, params, spec, backend=backend)
    assert out.is_contiguous(memory_format=memory_format)
    kept = out.clone()
    x.zero_()
    functional.residual_block(torch.randn_like(x), params, spec, backend=backend)
    assert torch.equal(out, kept), "a later call wrote into an earlier call's output"
