"""float32 multiplied as tf32: its error is what rounding the operands costs."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from support.blocks import bottleneck
from support.emulated_checks import LARGE, Checks, devices, modes
from support.runs import run, run_exact
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class RoundedToTf32(TorchDispatchMode):
    """Rounds what PyTorch's float32 convolutions multiply to 10 bits of mantissa, as tensor cores take it."""

    OPERANDS: ClassVar = {torch.ops.aten.convolution.default: 2, torch.ops.aten.convolution_backward.default: 3}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = self.OPERANDS.get(func, 0)
        return func(*(self.rounded(t) if i < count else t for i, t in enumerate(args)), **(kwargs or {}))

    @staticmethod
    def rounded(t: Tensor) -> Tensor:
        if t.dtype != torch.float32:
            return t
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@modes
@devices
@pytest.mark.parametrize("act", ["identity", "relu"])
def test_tf32(act: str, device: tuple[int, int], mode: str, check: Checks) -> None:
    """Its error is what rounding the operands costs; without ReLU no mask can flip, and the bar is that alone."""
    for case in (bottleneck("projection", act=act), bottleneck("identity", "pre", act)):
        with RoundedToTf32():
            check.trains(case, mode, device=device, tf32=True)


def test_tf32_is_asked_for(check: Checks) -> None:
    given, dout = bottleneck("identity").build(torch.float32), bottleneck("identity").upstream(torch.float32)
    exact = run_exact(*given, dout)
    errors = []
    for tf32 in (False, True):
        check.set(tf32=tf32)
        got = run(*given, "emulated", dout)
        errors.append(max(float((got[n].double() - exact[n]).abs().max()) for n in ("out", "grad of x")))  # type: ignore[union-attr]
    assert errors[1] > 50 * errors[0]


def test_evaluation_in_tf32(check: Checks) -> None:
    with RoundedToTf32():
        assert "chain" in check.evaluates(bottleneck("projection"), tf32=True)
        assert "chain" not in check.evaluates(bottleneck("projection"), tf32=True, device=LARGE)
