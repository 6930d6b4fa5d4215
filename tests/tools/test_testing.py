"""`assert_equivalent` passes what is right, and its message names what is wrong."""

from __future__ import annotations

import pytest
import torch
from support.small_net import picture, small_net
from support.wrong_formulas import no_statistics

from resnet_fused.ops import reference
from resnet_fused.testing import assert_equivalent


def test_a_right_model_passes() -> None:
    assert_equivalent(small_net(), picture(), backend="eager", seeds=2)
    assert_equivalent(small_net(), picture(), dtype=torch.bfloat16, train=True, backend="eager", seeds=2)


def test_the_message_names_the_worst_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_block", no_statistics)
    with pytest.raises(AssertionError) as raised:
        assert_equivalent(small_net(), picture(), backend="eager", seeds=2)
    message = str(raised.value)
    assert "Sequential, training, float32, contiguous" in message and "1: bn1.running_mean: error" in message
    assert "more tensors" in message and "at most 10" in message


def test_too_few_fused_blocks_fail() -> None:
    with pytest.raises(AssertionError, match="0 of 2 blocks run fused; not 0, 1"):
        assert_equivalent(small_net(), picture(), backend="eager", train=False, seeds=1, min_fused=1.0)
