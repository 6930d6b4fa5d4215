"""Depthwise convolutions whose gradients have kernels of their own, beside eager and fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from support.equivalence import assert_as_accurate
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, IntPair, StageSpec


class Depthwise(NamedTuple):
    channels: int
    size: IntPair
    kernel: IntPair
    stride: IntPair = (1, 1)
    padding: IntPair = (0, 0)
    dilation: IntPair = (1, 1)
    batch: int = 2

    @property
    def geometry(self) -> tuple[IntPair, IntPair, IntPair]:
        return self.stride, self.padding, self.dilation


# Windows of more than nine taps have a weight gradient, strides a bfloat16 gradient of the input.
CASES: dict[str, Depthwise] = {
    "5 x 5": Depthwise(40, (9, 11), (5, 5), padding=(2, 2)),
    "5 x 5, stride 2": Depthwise(16, (11, 8), (5, 5), (2, 2), (2, 2)),
    "3 x 3, stride 2": Depthwise(33, (9, 9), (3, 3), (2, 2), (1, 1)),
    "7 x 7, one row": Depthwise(3, (1, 13), (7, 7), padding=(3, 3)),
    "uneven": Depthwise(17, (12, 7), (4, 3), (3, 2), (0, 2), (1, 2)),
    "dilated": Depthwise(70, (13, 13), (5, 3), (2, 1), (4, 3), (2, 3), batch=1),
    "stride beyond the window": Depthwise(31, (10, 12), (2, 1), (3, 4)),
    "padding beyond the window": Depthwise(8, (3, 4), (3, 4), (1, 2), (4, 5)),
    "one pixel": Depthwise(5, (1, 1), (5, 5), (2, 2), (2, 2), batch=3),
    "bands": Depthwise(32, (70, 70), (5, 5), (2, 2), (2, 2), batch=1),
    "many images": Depthwise(2, (4, 4), (4, 4), padding=(2, 1), batch=37),
}


def tensors(case: Depthwise, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, weight)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.channels, *case.size, generator=generator).to(dtype)
    weight = torch.randn(case.channels, 1, *case.kernel, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), weight


def fused(case: Depthwise, x: Tensor, weight: Tensor) -> Tensor:
    stage = StageSpec(*case.geometry, case.channels, norm=False, act="identity")
    return functional.residual_block(x, BlockParams((StageParams(weight),)), BlockSpec((stage,)), backend="native")


def eager(case: Depthwise, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, *case.geometry, case.channels)


def output_gradient(case: Depthwise, x: Tensor, weight: Tensor) -> Tensor:
    shape = eager(case, x.float(), weight.float()).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def gradients(run: object, case: Depthwise, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and weight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(run(case, *leaves), leaves, dy)  # type: ignore[operator, return-value]


def assert_gradients(case: Depthwise, dtype: torch.dtype) -> None:
    """As accurate as eager's in NCHW, which oneDNN's faults do not reach (`test_onednn`)."""
    x, weight = tensors(case, dtype)
    dy = output_gradient(case, x, weight)
    got = gradients(fused, case, x, weight, dy)
    expected = gradients(eager, case, x.contiguous(), weight, dy)
    exact = gradients(eager, case, x.double(), weight.double(), dy.double())
    for name, ours, theirs, truth in zip(("x", "weight"), got, expected, exact, strict=True):
        assert_as_accurate(f"gradient of {name}", ours, theirs, truth)


def assert_all() -> None:
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            try:
                assert_gradients(case, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}: {error}") from error
