"""The operators of the CUDA kernels as torch.compile relies on them: opcheck, fake kernels, a graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.blocks import Case, bottleneck
from support.cuda_operators import OPERATORS, arguments, operator
from support.eager_crashes import eager_may_crash
from support.emulated_checks import Checks
from support.fake_kernels import assert_fake_agrees
from support.matrix import FORMATS, family
from support.operator_arguments import CASES
from support.random_blocks import cases
from torch import Tensor

from resnet_fused import functional  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_opcheck(name: str, check: Checks) -> None:
    check.set()
    torch.library.opcheck(operator(name), arguments(name, CASES["bottleneck"], check))


@pytest.mark.parametrize("name", OPERATORS)
@given(case=cases(), memory_format=st.sampled_from(FORMATS), library=st.sampled_from(["choose", "none", "all"]))
@settings(family, max_examples=25)
def test_fakes_of_any_block(
    name: str, case: Case, memory_format: torch.memory_format, library: str, check: Checks
) -> None:
    # in the emulator the library's convolutions are eager's
    assume(library == "none" or not any(map(eager_may_crash, case.spec.convs, case.kernels)))
    check.set(library=library)
    assert_fake_agrees(operator(name), tuple(arguments(name, case, check, memory_format)))


def test_compiles_into_a_graph_of_operators(check: Checks) -> None:
    check.set()
    x, params, spec = bottleneck("identity").build(torch.float32, torch.channels_last)
    x.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return functional.residual_block(x, params, spec, backend="emulated")

    out = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    out.sum().backward()
    assert torch.equal(out, step(x.detach())) and x.grad is not None
