"""How the operator behaves inside autograd: partial gradients, graphs, in-place changes, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.blocks import Case, block, bottleneck
from support.matrix import BACKENDS
from support.named_tensors import is_buffer, leaves, named_tensors
from support.runs import run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resnet_fused import functional
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec

backends = pytest.mark.parametrize("backend", BACKENDS)

SCALED: dict[str, Any] = {"out_channels": 6, "size": (7, 6), "bias": True, "branch_scale": "[C]", "skip_scale": "0-d"}
CASE, STRIDES_LATER = (block(3, "projection", channels=4, stride=2, strides_at=at, **SCALED) for at in (0, 1))
IDENTITY = block(2, channels=4, size=(6, 5))
PRE = block(2, "identity", order="pre", channels=4, size=(6, 5), branch_scale="0-d")

WANTED: dict[str, Callable[[str], bool]] = {
    "only x": lambda name: name == "x",
    "all but x": lambda name: name != "x",
    "only convolution weights": lambda name: name.endswith(".weight"),
    "frozen convolution weights": lambda name: not name.endswith(".weight"),
    "only norm parameters": lambda name: "norm_" in name,
    "only norm biases": lambda name: name.endswith("norm_bias"),
    "only convolution biases": lambda name: name.endswith(".bias"),
    "only the branch scale": lambda name: name == "branch_scale",
    "only the skip scale": lambda name: name == "skip_scale",
    "only the projection": lambda name: name.startswith("projection"),
    "only the first stage": lambda name: name.startswith("stages.0"),
    "only the last stage": lambda name: name.startswith("stages.2"),
}


def outputs(
    x: Tensor, params: BlockParams, spec: BlockSpec, backend: str, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and its leaves by name."""
    x, params = x.detach().requires_grad_(wanted("x")), leaves(params, wanted)
    out = functional.residual_block(x, params, spec, backend=backend)
    return out, {"x": x} | {n: t for n, t in named_tensors(params).items() if not is_buffer(n)}


@backends
@pytest.mark.parametrize(
    ("case", "memory"),
    [(CASE, "default"), (CASE, "low"), (STRIDES_LATER, "low")],
    ids=["default", "low", "low, strides later"],
)
@pytest.mark.parametrize("wanted", WANTED)
def test_only_some_inputs_require_grad(wanted: str, case: Case, memory: str, backend: str) -> None:
    x, params, spec = case.build()
    spec, dout = spec.with_memory(memory), case.upstream()  # type: ignore[arg-type]
    full = run(x, params, spec, "eager", dout)
    out, tensors = outputs(x, params, spec, backend, WANTED[wanted])
    out.backward(dout)
    assert any(map(WANTED[wanted], tensors))
    for name, tensor in tensors.items():
        if WANTED[wanted](name):
            expected = full["grad of " + name]
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert tensor.grad is None, name


@backends
@pytest.mark.parametrize("batch_stats", [True, False])
def test_no_graph_where_nothing_requires_grad(batch_stats: bool, backend: str) -> None:
    x, params, spec = block(2, batch_stats=batch_stats).build()
    out = functional.residual_block(x, params, spec, backend=backend)
    assert not out.requires_grad and out.grad_fn is None
    with torch.no_grad():
        assert not functional.residual_block(x.requires_grad_(), params, spec, backend=backend).requires_grad


@backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_without_autograd(batch_stats: bool, mode: Callable, backend: str) -> None:
    """The same output, and in training the same update of the running statistics, without a graph."""
    x, params, spec = block(2, "projection", batch_stats=batch_stats).build()
    expected = run(x, params, spec, "eager")
    with mode():
        for name, value in run(x, params, spec, backend).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


@backends
def test_second_backward_without_retain_graph(backend: str) -> None:
    out, _ = outputs(*IDENTITY.build(), backend)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


@backends
def test_retained_graph_gives_the_same_gradients_again(backend: str) -> None:
    out, tensors = outputs(*CASE.build(), backend)
    first, second = (
        torch.autograd.grad(out, list(tensors.values()), CASE.upstream(), retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@backends
def test_same_block_twice_before_backward(backend: str) -> None:
    """A second call updates the running statistics that the first has seen; its backward must not mind."""
    x, params, spec = CASE.build()
    gradients = {}
    for name in (backend, "eager"):
        shared = leaves(params)
        outs = [functional.residual_block(x * k, shared, spec, backend=name) for k in (1, 2)]
        (outs[0] * CASE.upstream(seed=0) + outs[1] * CASE.upstream(seed=1)).sum().backward()
        gradients[name] = {n: t if is_buffer(n) else t.grad for n, t in named_tensors(shared).items()}
    for n, expected in gradients["eager"].items():
        torch.testing.assert_close(
            gradients[backend][n], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}"
        )


@backends
@pytest.mark.parametrize("changed", ["x", "stages.0.weight", "stages.1.weight", "stages.0.norm_weight"])
def test_in_place_change_before_backward(changed: str, backend: str) -> None:
    x, params, spec = IDENTITY.build()
    out, tensors = outputs(x, params, spec, backend)
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@backends
def test_in_place_change_of_the_output_that_masks(backend: str) -> None:
    out, _ = outputs(*IDENTITY.build(), backend)
    loss = out.sum()
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
@pytest.mark.parametrize("case", [CASE, IDENTITY, PRE], ids=["projection", "identity", "pre"])
def test_second_derivative_says_what_to_do(case, backend: str) -> None:  # type: ignore[no-untyped-def]
    x, params, spec = case.build()
    out, tensors = outputs(x, params, spec, backend)
    inputs = list(tensors.values())
    grads = torch.autograd.grad(out, inputs, case.upstream(), create_graph=True)
    expected = run(x, params, spec, "eager", case.upstream())
    for name, grad in zip(tensors, grads, strict=True):
        torch.testing.assert_close(grad.detach(), expected[f"grad of {name}"], rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"no second derivative of residual_block.*backend='eager'"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)


@backends
def test_second_derivative_by_eager(backend: str) -> None:
    """What the message advises works."""
    out, tensors = outputs(*IDENTITY.build(), "eager")
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    grad.square().sum().backward()
    assert tensors["x"].grad is not None and tensors["x"].grad.any()


@backends
def test_unused_output_costs_no_gradient(backend: str) -> None:
    """An undefined gradient of the output gives undefined gradients, not zeros."""
    out, tensors = outputs(*IDENTITY.build(), backend)
    grads = torch.autograd.grad(Undefined.apply(out), list(tensors.values()), allow_unused=True)
    assert grads == (None,) * len(tensors)


class Undefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.sum()

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        return None


@backends
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool, backend: str) -> None:
    """Activation checkpointing around a block: the gradients do not change."""
    x, params, spec = CASE.build()
    expected = run(x, params, spec, "eager", CASE.upstream())
    given = leaves(params)
    leaf = x.detach().requires_grad_()
    out = checkpoint(
        lambda x: functional.residual_block(x, given, spec, backend=backend), leaf, use_reentrant=use_reentrant
    )
    out.backward(CASE.upstream())
    for name, tensor in {"x": leaf, **named_tensors(given)}.items():
        if not is_buffer(name):
            torch.testing.assert_close(tensor.grad, expected[f"grad of {name}"], rtol=1e-10, atol=1e-10)


@backends
@pytest.mark.parametrize(
    ("skip", "memory", "expected"),
    [
        ("identity", "default", {0, 1, 2}),
        ("identity", "low", {0, 1}),
        ("projection", "default", {0, 1, 2, 3}),
        ("projection", "low", {1}),
    ],
)
def test_saves_what_the_design_says(skip: str, memory: str, expected: set[int], backend: str) -> None:
    """A bottleneck keeps x, convolution outputs and out; its second convolution strides beside a projection."""
    case = bottleneck(skip, memory=memory, channels=16, width=4, size=(7, 7))
    x, params, spec = case.build(torch.float32, torch.channels_last)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    given = leaves(params)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.residual_block(x.requires_grad_(), given, spec, backend=backend)
    own = {t.untyped_storage().data_ptr() for t in named_tensors(given).values()}
    activations = sum(size for pointer, size in saved.items() if pointer not in own)
    outputs = [4 * case.batch * width * h * w for width, (h, w) in zip(case.widths, case.sizes, strict=True)]
    wanted = x.nbytes + outputs[2] + sum(outputs[i] for i in expected)
    statistics = 2 * 4 * sum(case.widths)
    assert wanted <= activations <= wanted + 2 * statistics
