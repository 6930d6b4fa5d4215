"""Whatever the layout of what comes in, or of what a saved-tensor hook gives back: PyTorch's strides and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.blocks import Case, block
from support.eager_crashes import eager_may_crash
from support.matrix import BACKENDS, FORMATS, family
from support.named_tensors import leaves, named_tensors
from support.random_blocks import cases
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.params import BlockParams, map_tensors

backends = pytest.mark.parametrize("backend", BACKENDS)
LAST = torch.channels_last
ARRANGEMENTS = ["contiguous", "channels_last", "channels of a slice", "columns of a slice", "expanded", "transposed"]


def arranged(t: Tensor, arrangement: str) -> Tensor:
    """Equal values, or for "expanded" those of the first picture, in another layout."""
    n, c, h, w = t.shape
    if arrangement == "expanded":
        return t[:1].expand(n, c, h, w)
    if arrangement == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if arrangement in ("contiguous", "channels_last"):
        return t.contiguous(memory_format=LAST if arrangement == "channels_last" else torch.contiguous_format)
    columns = arrangement == "columns of a slice"
    wide = t.new_full((n, c if columns else c + 3, h, w + 2 if columns else w), float("nan"))
    wide = wide.contiguous(memory_format=LAST)
    view = wide[..., 1:-1] if columns else wide[:, 2:-1]
    return view.copy_(t)


def steps(t: Tensor) -> list[int]:
    """The strides that count: a dimension of size 1 is never stepped along."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def weights_arranged(params: BlockParams, last: list[bool]) -> BlockParams:
    choice = iter(last)
    return map_tensors(params, lambda name, t: t.contiguous(memory_format=FORMATS[next(choice)]) if t.dim() == 4 else t)


def strides_of(x: Tensor, params: BlockParams, case: Case, backend: str, frozen: bool) -> dict[str, list[int]]:
    leaf, tensors = x.detach().requires_grad_(), leaves(params)
    out = functional.residual_block(leaf, tensors, case.spec, backend=backend)
    out.backward(torch.ones_like(out))
    assert leaf.grad is not None
    found = {"out": steps(out), "grad of x": steps(leaf.grad)}
    if frozen:
        with torch.no_grad():
            found["evaluated"] = steps(functional.residual_block(x, params, case.spec, backend=backend))
    return found


@backends
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    arrangement=st.sampled_from(ARRANGEMENTS),
    last=st.lists(st.booleans(), min_size=8, max_size=8),
)
@settings(family, max_examples=150)
def test_strides_are_those_of_pytorch(
    case: Case, dtype: torch.dtype, arrangement: str, last: list[bool], backend: str
) -> None:
    """Of a random block, whose tensors are laid out at random; but for one channel in a slice, where PyTorch is of
    two minds."""
    assume(not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    x, params, _ = case.build(dtype)
    if case.channels == 1 and "slice" in arrangement:
        arrangement = "channels_last"
    x, params = arranged(x, arrangement), weights_arranged(params, last)
    frozen = not case.spec.batch_stats
    assert strides_of(x, params, case, backend, frozen) == strides_of(x, params, case, "eager", frozen)


class Elsewhere:
    """A saved-tensor hook that gives each tensor back with equal values and another layout."""

    def __init__(self, arrangement: str) -> None:
        self.arrangement = arrangement

    def __call__(self, t: Tensor) -> Tensor:
        if t.dim() == 2:
            return t.t().contiguous().t()
        return arranged(t, self.arrangement) if t.dim() == 4 and t.dtype != torch.uint8 else t.clone().contiguous()


def gradients(compute: Any, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(compute(), inputs, dout, allow_unused=True)


RESTORED = ["contiguous", "channels of a slice", "columns of a slice", "transposed"]


@backends
@pytest.mark.parametrize("arrangement", RESTORED)
@pytest.mark.parametrize("skip", ["none", "identity", "projection"])
def test_hooks_may_change_the_layout_of_what_a_block_saves(skip: str, arrangement: str, backend: str) -> None:
    case = block(3, skip, channels=4, branch_scale="[C]", size=(6, 5))  # type: ignore[arg-type]
    x, params, spec = case.build(torch.float64, LAST)
    tensors, leaf = leaves(params), x.requires_grad_()
    inputs = [leaf, *(t for t in named_tensors(tensors).values() if t.requires_grad)]

    def compute() -> Tensor:
        return functional.residual_block(leaf, tensors, spec, backend=backend)

    expected = gradients(compute, inputs, case.upstream())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, Elsewhere(arrangement)):
        got = gradients(compute, inputs, case.upstream())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("arrangement", RESTORED)
def test_hooks_may_change_the_layout_of_what_a_norm_saves(arrangement: str, backend: str) -> None:
    bn, x = nn.BatchNorm2d(17).double(), torch.randn(2, 17, 5, 6, dtype=torch.float64).contiguous(memory_format=LAST)
    leaf, dout = x.requires_grad_(), torch.randn_like(x)
    inputs = [leaf, *bn.parameters()]

    def compute() -> Tensor:
        return functional.batch_norm_act(leaf, bn, residual=leaf, backend=backend)

    expected = gradients(compute, inputs, dout)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, Elsewhere(arrangement)):
        got = gradients(compute, inputs, dout)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@backends
def test_saved_on_the_host(backend: str) -> None:
    """`save_on_cpu` gives contiguous tensors back; max pooling's positions among them."""
    case = block(2, "projection", channels=4, out_channels=6, size=(8, 7))
    x, params, spec = case.build(torch.float32, LAST)
    tensors, leaf = leaves(params), x.requires_grad_()

    def compute() -> Tensor:
        out = functional.residual_block(leaf, tensors, spec, backend=backend)
        return functional.max_pool2d(out, 3, 2, 1, backend=backend)

    dout = torch.randn(2, 6, 4, 4)
    expected = gradients(compute, [leaf], dout)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        got = gradients(compute, [leaf], dout)
    assert torch.equal(got[0], expected[0])  # type: ignore[arg-type]


UPSTREAM = [*ARRANGEMENTS, "one value"]


def upstream(like: Tensor, arrangement: str) -> Tensor:
    if arrangement == "one value":  # as from .sum() and .mean()
        return torch.full((), 0.5, dtype=like.dtype).expand(like.shape)
    return arranged(torch.randn(like.shape, dtype=like.dtype), arrangement)


@backends
@pytest.mark.parametrize("arrangement", UPSTREAM)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["identity", "projection", "none", "pre", "pool", "norm", "norm, no activation"])
def test_upstream_gradients_of_any_layout(
    name: str, memory_format: torch.memory_format, arrangement: str, backend: str
) -> None:
    """Expanded (stride 0), sliced, or in another memory format."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    bn = nn.BatchNorm2d(4).double()
    skip = {"pre": "identity"}.get(name, name)

    def compute(backend: str) -> tuple[Tensor, list[Tensor]]:
        if name == "pool":
            return functional.max_pool2d(x, 3, 2, 1, backend=backend), [x]
        if name.startswith("norm"):
            act = "relu" if name == "norm" else "identity"
            return functional.batch_norm_act(x, bn, residual=x, act=act, backend=backend), [x, *bn.parameters()]  # type: ignore[arg-type]
        case = block(2, skip, order="pre" if name == "pre" else "post", channels=4, size=(6, 5))  # type: ignore[arg-type]
        _, params, spec = case.build(torch.float64, memory_format)
        tensors = leaves(params)
        wanted = [t for t in named_tensors(tensors).values() if t.requires_grad]
        return functional.residual_block(x, tensors, spec, backend=backend), [x, *wanted]

    out, inputs = compute(backend)
    exact, exact_inputs = compute("eager")
    dout = upstream(out, arrangement)
    got, expected = torch.autograd.grad(out, inputs, dout), torch.autograd.grad(exact, exact_inputs, dout)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@backends
@pytest.mark.parametrize("memory_format", FORMATS)
def test_weight_gradients_have_their_weights_strides(memory_format: torch.memory_format, backend: str) -> None:
    """Those of dimensions of one value too, which DistributedDataParallel compares with its buckets'."""
    x, params, spec = block(2, "projection", channels=64, out_channels=128, stride=2).build(
        torch.float32, memory_format
    )
    tensors = leaves(params)
    functional.residual_block(x.requires_grad_(), tensors, spec, backend=backend).square().sum().backward()
    for name, tensor in named_tensors(tensors).items():
        if tensor.dim() == 4:
            assert tensor.grad is not None and tensor.grad.stride() == tensor.stride(), name
