"""Strided, misaligned and expanded tensors give the bits of dense ones."""

from __future__ import annotations

import pytest
import torch
from support.blocks import bottleneck, frozen
from support.emulated_blocks import block
from support.emulated_checks import LARGE, Checks
from support.layouts import LAYOUTS
from support.runs import run
from support.same_bits import assert_same_bits
from torch import Tensor

from resnet_fused.params import map_tensors


@pytest.mark.parametrize("which", ["x", "weights", "dout", "norms"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "misaligned"])
@pytest.mark.parametrize(("channels", "dtype"), [(8, torch.float32), (16, torch.bfloat16), (6, torch.float16)], ids=str)
def test_strided_tensors(channels: int, dtype: torch.dtype, layout: str, which: str, check: Checks) -> None:
    """Windows of wider tensors whose rest is NaN, permuted and misaligned ones: the same bits as from dense tensors."""
    check.set(device=LARGE)
    arrange = {**LAYOUTS, "misaligned": misaligned}[layout]

    def vector(t: Tensor) -> Tensor:
        return arrange(t.reshape(1, -1, 1, 1))[0, :, 0, 0]

    def change(name: str, t: Tensor) -> Tensor:
        if which == "weights" and t.dim() == 4:
            return arrange(t)
        return vector(t) if which == "norms" and t.dim() == 1 else t

    for case in (bottleneck("projection", channels=channels), frozen(bottleneck("identity", channels=channels))):
        x, params, spec = case.build(dtype, torch.channels_last)
        dout = case.upstream(dtype)
        given = (arrange(x) if which == "x" else x, map_tensors(params, change), spec)
        got = run(*given, "emulated", arrange(dout) if which == "dout" else dout)
        assert_same_bits(got, run(x, params, spec, "emulated", dout))
        if not spec.batch_stats and which != "dout":
            assert_same_bits(run(*given, "emulated"), run(x, params, spec, "emulated"))


def misaligned(t: Tensor) -> Tensor:
    """Channels last, one value behind an aligned address."""
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    n, c, h, w = t.shape
    return flat[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def test_expanded_upstream_gradient(check: Checks) -> None:
    """``out.sum().backward()`` hands over a gradient whose strides are all 0."""
    check.set()
    for order in ("post", "pre"):
        case = block(2, order=order)  # type: ignore[arg-type]
        given, ones = case.build(torch.float32), torch.ones(case.out_shape)
        assert_same_bits(run(*given, "emulated", torch.ones(()).expand(case.out_shape)), run(*given, "emulated", ones))
