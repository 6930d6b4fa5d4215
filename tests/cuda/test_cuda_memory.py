"""Nothing is read before it is written, kept that nobody reads, or held after its last reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.blocks import bottleneck, frozen
from support.emulated_blocks import block
from support.emulated_checks import LARGE, SMALL, Checks, modes
from support.frozen_blocks import check_frozen_block
from support.live_memory import Bytes, live_memory
from support.operator_arguments import every_gradient
from support.runs import run

from resnet_fused.ops import autograd


@pytest.mark.usefixtures("poisoned")
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_nothing_that_was_not_written(dtype: torch.dtype, mode: str, check: Checks) -> None:
    """Fresh memory is NaN here; a value read before it is written would show."""
    scales: Any = {"branch_scale": "[C]", "skip_scale": "0-d", "bias": True}
    width = 72 if dtype == torch.float32 else 136
    for device in (SMALL, LARGE):
        for case in (
            bottleneck("projection", memory="low", **scales),
            bottleneck("identity", "pre", channels=24, width=width, **scales),
        ):
            check.set(mode, device=device)
            x, params, spec = case.build(dtype, torch.channels_last)
            trained = run(x, params, spec, "emulated", case.upstream(dtype))
            evaluated = run(*frozen(case).build(dtype, torch.channels_last), "emulated")
            assert all(t is None or t.isfinite().all() for t in [*trained.values(), evaluated["out"]])


@pytest.mark.parametrize(
    ("skip", "memory", "mode", "library", "share"),
    [
        ("identity", "default", "phased", "none", 0.75),
        ("projection", "low", "phased", "none", 0.6),
        ("identity", "default", "single", "all", 0.35),
        ("projection", "low", "phased", "all", 0.3),
    ],
)
def test_memory_is_free_after_the_last_phase_that_reads_it(
    skip: Any, memory: Any, mode: Any, library: Any, share: float, check: Checks
) -> None:
    """share: of what a backward pass allocates in all, how much lives at the same time. A launch of all needs all."""
    if library == "all" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("without oneDNN, PyTorch's bfloat16 convolutions write out their windows, which counts as ours")
    case = block(3, skip, memory=memory, channels=64, width=16, out_channels=64, size=(8, 8))
    x, params, spec = case.build(torch.bfloat16, torch.channels_last)
    tensors, dout = (
        autograd.tensors_of(params, x),
        case.upstream(torch.bfloat16).contiguous(memory_format=torch.channels_last),
    )
    needs = every_gradient(tensors)

    def lives() -> Bytes:
        out, ys, stats = check.backend.forward(spec, tensors, needs)
        return live_memory(lambda: check.backend.backward(spec, dout, out, ys, stats, tensors, needs))

    check.set(mode, library)
    found = lives()
    assert found.peak < share * found.allocated
    check.set("single", "none")
    together = lives()
    assert together.peak == together.allocated


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize(
    ("skip", "stride"), [("none", 1), ("none", 2), ("identity", 1), ("projection", 1), ("projection", 2)]
)
def test_frozen_blocks_keep_what_backward_reads(skip: str, stride: int, memory: str) -> None:
    check_frozen_block("emulated", skip, memory, stride)  # type: ignore[arg-type]
