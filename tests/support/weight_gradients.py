"""Convolutions whose weight gradient the engine computes, beside eager and fp64.

As a program, in the instruction set that RESNET_FUSED_ISA names: ``python -m support.weight_gradients``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from support.engine_runs import threads
from support.equivalence import assert_as_accurate
from support.matrix import FORMATS
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec, IntPair, StageSpec

THREADS = (1, 2, 7)


class Convolution(NamedTuple):
    """channels: in, out."""

    channels: IntPair
    size: IntPair
    kernel: IntPair = (3, 3)
    stride: IntPair = (1, 1)
    padding: IntPair = (1, 1)
    dilation: IntPair = (1, 1)
    groups: int = 1
    batch: int = 3

    @property
    def geometry(self) -> tuple[IntPair, IntPair, IntPair, int]:
        return self.stride, self.padding, self.dilation, self.groups


# Those that run without being forced to: 32 channels on one side and 64 on the other, groups of 4.
CASES: dict[str, Convolution] = {
    "3x3": Convolution((64, 32), (9, 11)),
    "1x1": Convolution((32, 64), (7, 7), (1, 1), padding=(0, 0)),
    "1x1, stride 2": Convolution((64, 96), (7, 9), (1, 1), (2, 2), (0, 0)),
    "1x1, padded": Convolution((64, 32), (5, 4), (1, 1), padding=(2, 1)),
    "3x3, stride 2": Convolution((96, 64), (15, 8), stride=(2, 2)),
    "tails of channels": Convolution((37, 83), (6, 7)),
    "uneven": Convolution((65, 33), (12, 7), (4, 3), (3, 2), (0, 2), (1, 2)),
    "dilated": Convolution((34, 70), (13, 13), (3, 5), padding=(2, 4), dilation=(2, 3), batch=1),
    "padding beyond the window": Convolution((32, 64), (3, 4), (2, 3), padding=(3, 4)),
    "window beyond the picture": Convolution((64, 40), (2, 3), (5, 7), padding=(2, 3), batch=9),
    "even rows, no padding": Convolution((40, 64), (6, 8), (2, 2), padding=(0, 0)),
    "odd rows, no padding": Convolution((64, 40), (6, 7), (3, 2), padding=(0, 0)),
    "one pixel": Convolution((64, 64), (1, 1), batch=5),
    "one image of two bands": Convolution((64, 64), (70, 66), batch=1),
    "bands of images side by side": Convolution((64, 64), (40, 41), stride=(1, 2), batch=19),
    "outputs shared": Convolution((192, 192), (5, 4), batch=11),
    "outputs shared, stride 2": Convolution((384, 768), (6, 3), (1, 1), (2, 2), (0, 0), batch=20),
    "few channels": Convolution((3, 64), (12, 13), (7, 7), (2, 2), (3, 3)),
    "few channels, wide padding": Convolution((7, 64), (5, 4), (2, 4), (1, 3), (0, 5), (2, 1)),
    "groups": Convolution((64, 64), (8, 9), groups=16),
    "groups across panels": Convolution((120, 72), (7, 5), stride=(2, 1), groups=6),
    "groups of unlike widths": Convolution((200, 40), (5, 6), (1, 1), padding=(0, 0), groups=5),
}
# Those that run where the instruction set is named only.
FORCED: dict[str, Convolution] = {
    "one channel": Convolution((1, 1), (5, 5)),
    "few channels, dilated": Convolution((3, 17), (12, 13), (3, 3), dilation=(1, 2)),
    "depthwise": Convolution((40, 40), (9, 6), groups=40),
}


def tensors(case: Convolution, integers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, dy) in bfloat16. Of small integers every sum is exact in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).bfloat16()
        return torch.randn(shape, generator=generator).bfloat16()

    inner, outer = case.channels
    x = draw(case.batch, inner, *case.size).contiguous(memory_format=torch.channels_last)
    weight = draw(outer, inner // case.groups, *case.kernel)
    return x, weight, draw(*F.conv2d(x.float(), weight.float(), None, *case.geometry).shape)


def fused(case: Convolution, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    leaf = weight.detach().requires_grad_()
    spec = BlockSpec((StageSpec(*case.geometry, norm=False, act="identity"),))
    out = functional.residual_block(x, BlockParams((StageParams(leaf),)), spec, backend="native")
    return torch.autograd.grad(out, leaf, dy)[0]


def eager(case: Convolution, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, leaf, None, *case.geometry), leaf, dy)[0]


def exact(case: Convolution, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    return eager(case, x.double(), weight.double(), dy.double())


def by_engine(case: Convolution) -> bool:
    """Whether none of PyTorch's operations computed the gradient."""
    x, weight, dy = tensors(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(case, x, weight, dy)
    names = {event.name for event in profile.events()}
    return not names & {"aten::convolution_backward", "aten::mm"}


def assert_exact(case: Convolution) -> None:
    """Small integers: the exact sums, rounded once, or not at all for a float32 weight; in any number of threads."""
    x, weight, dy = tensors(case, integers=True)
    truth = exact(case, x, weight, dy)
    weights = (weight, weight.float()) if by_engine(case) else (weight,)
    for count in THREADS:
        for given in weights:
            with threads(count), torch.autocast("cpu", torch.bfloat16):
                got = fused(case, x, given, dy)
            wrong = int((got != truth.to(given.dtype)).sum())
            assert got.dtype == given.dtype and not wrong, f"{given.dtype}, {count} threads: {wrong} are wrong"


def assert_accurate(case: Convolution) -> None:
    """As eager in NCHW, which oneDNN's faults do not reach (`test_onednn`), in weight's memory format."""
    x, weight, dy = tensors(case)
    expected, truth = eager(case, x.contiguous(), weight, dy), exact(case, x, weight, dy)
    for memory_format in FORMATS:
        for count in THREADS:
            with threads(count):
                given = weight.contiguous(memory_format=memory_format)
                got = fused(case, x, given, dy.contiguous(memory_format=memory_format))
            assert got.stride() == given.stride()
            assert_as_accurate(f"{count} threads", got, expected, truth, factor=1)


def main() -> None:
    for name, case in (CASES | FORCED).items():
        assert by_engine(case), name
        try:
            assert_exact(case)
            assert_accurate(case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    print("all")


if __name__ == "__main__":
    main()
