"""Any choice of gradients: those asked for, and the same as when all are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import Case, bottleneck
from support.emulated_checks import Checks, modes
from support.matrix import family
from support.named_tensors import leaves, named_tensors
from support.operator_arguments import backward_arguments, tensors_in
from support.random_blocks import cases
from support.runs import run

from resnet_fused import functional  # type: ignore[attr-defined]


@modes
def test_only_the_wanted_gradients(mode: str, check: Checks) -> None:
    """Frozen parameters, and an x that needs no gradient, leave the other gradients as they are."""
    check.set(mode)
    for order in ("post", "pre"):
        case = bottleneck("projection", order, branch_scale="[C]", skip_scale="0-d", bias=True)
        x, params, spec = case.build(torch.float32, torch.channels_last)
        dout = case.upstream(torch.float32)
        every = run(x, params, spec, "emulated", dout)
        for wanted in named_tensors(params):
            if f"grad of {wanted}" not in every:
                continue
            chosen = leaves(params, lambda name, wanted=wanted: name == wanted)  # type: ignore[misc]
            functional.residual_block(x, chosen, spec, backend="emulated").backward(dout)
            for name, tensor in named_tensors(chosen).items():
                if name == wanted:
                    assert torch.equal(tensor.grad, every[f"grad of {name}"]), name  # type: ignore[arg-type]
                else:
                    assert tensor.grad is None, name


@settings(family, max_examples=25)
@given(case=cases(), choice=st.lists(st.booleans(), min_size=31, max_size=31), library=st.sampled_from(["none", "all"]))
def test_any_choice_of_gradients(case: Case, choice: list[bool], library: str, check: Checks) -> None:
    check.set(library=library)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    dout, count = case.upstream(torch.float32), tensors_in(spec)
    how = check.backend.how(spec, x, [p.weight for p in params.convs])
    every, some = (backward_arguments(x, params, spec, dout, needs, how) for needs in ([True] * count, choice[:count]))
    backward = torch.ops.resnet_fused.residual_block_backward.cuda
    all_grads = iter(backward(*every))
    expected = [next(all_grads) if need else None for need in every[-3]]  # type: ignore[attr-defined]
    got = backward(*some)
    wanted = [e for e, need in zip(expected, some[-3], strict=True) if need]  # type: ignore[call-overload]
    for grad, value in zip(got, wanted, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-4)
