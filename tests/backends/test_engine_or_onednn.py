"""Which blocks the engine leaves to oneDNN in evaluation because its padding costs more than it gains."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused
from resnet_fused.ops import operators
from resnet_fused.spec import BlockSpec, StageSpec

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

PADDED = "its channels, padded to multiples of 32, are faster in oneDNN"


def reason(channels: list[int], dtype: torch.dtype, kernel: int = 3, stride: int = 1, groups: int = 1) -> str | None:
    """Of a chain of convolutions from one number of channels to the next; the stride is the last one's."""
    weights = [torch.zeros(out, given // groups, kernel, kernel, dtype=dtype) for given, out in pairwise(channels)]
    strides = [1] * (len(weights) - 1) + [stride]
    stages = tuple(
        StageSpec(stride=(s, s), padding=(kernel // 2,) * 2, groups=groups, batch_stats=False) for s in strides
    )
    return operators.engine_faster_elsewhere(BlockSpec(stages), weights, dtype)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([8, 8, 8], PADDED),
        ([16, 16, 16], PADDED),
        ([24, 24, 24], None),  # a third more outputs than asked for
        ([36, 36, 36], None),  # by Winograd
        ([32, 32, 32], None),
        ([3, 16, 16], PADDED),
        ([3, 32, 32, 64], None),  # ResNet-D's
    ],
)
def test_float32(channels: list[int], expected: str | None) -> None:
    assert reason(channels, torch.float32) == expected


def test_a_stem_of_three_channels_is_no_padding() -> None:
    """Their rows are padded by oneDNN as well."""
    for dtype in (torch.float32, torch.bfloat16):
        assert reason([3, 64], dtype, kernel=7, stride=2) != PADDED


def test_what_a_stride_leaves_counts_less() -> None:
    """Wide convolutions behind a stride have fewer pixels than the narrow one before it."""
    narrow = [8, 8, 64]
    assert reason(narrow, torch.float32) is None
    assert reason(narrow, torch.float32, stride=4) == PADDED


@pytest.mark.parametrize(("width", "taken"), [(16, False), (32, True), (48, False), (64, True)])
def test_groups_are_whole_panels(width: int, taken: bool) -> None:
    found = reason([4 * width, 4 * width], torch.float32, groups=4)
    assert found == (None if taken else f"convolutions of groups of {width} channels are faster in oneDNN")


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("width", [32, 48, 64, 72])
def test_bfloat16_as_explain_tells_it(block: type[nn.Module], width: int) -> None:
    """As pairs by vectors it is left to oneDNN wherever a channel is padded; tiles have not been measured."""
    channels = width * block.expansion  # type: ignore[attr-defined]
    model = resnet_fused.fuse(nn.Sequential(block(channels, width)).eval().bfloat16())
    told = str(resnet_fused.explain(model, torch.zeros(1, channels, 14, 14, dtype=torch.bfloat16)))
    pairs = operators.build_info()["instruction set"] == "avx512_bf16"
    assert (PADDED in " ".join(told.split())) == (pairs and width % 32 != 0)
    assert torch.isfinite(model(torch.ones(2, channels, 9, 9, dtype=torch.bfloat16))).all()
