"""Residual networks of three dimensions and of one, which have no fused form: `fuse` and `explain` say so."""

from __future__ import annotations

import pytest
import torchvision
from torch import Tensor, nn

from resnet_fused import explain, fuse


class Block1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def test_a_video_network_names_its_blocks() -> None:
    model = torchvision.models.video.r3d_18()
    with pytest.warns(UserWarning, match=r"layer1\.0 \(BasicBlock\): 3-d convolutions have no fused form"):
        fuse(model)
    rows = explain(model)
    assert [row.name for row in rows] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert {row.reason for row in rows} == {"3-d convolutions have no fused form; accepted: nn.Conv2d"}


def test_one_dimension() -> None:
    with pytest.warns(UserWarning, match=r"0 \(Block1d\): 1-d convolutions have no fused form"):
        rows = explain(fuse(nn.Sequential(Block1d(), Block1d())))
    assert [row.name for row in rows] == ["0", "1"]


def test_a_norm_of_another_dimension_is_no_batch_norm_of_the_convolution() -> None:
    """A head's, say: two-dimensional convolutions without a norm have nothing to fuse."""
    with pytest.warns(UserWarning, match="found no block"):
        fuse(nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)]))
