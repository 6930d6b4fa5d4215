"""Libraries whose blocks are torchvision's, in files of their own."""

from __future__ import annotations

import pytest
import torch
from support.stand_ins import copy_of, pictures, projection, settled
from support.training import assert_trains_as_eager
from torch import nn

from resnet_fused import explain, fuse

resnet = pytest.importorskip("torchvision.models.resnet")


@pytest.mark.parametrize("module", ["resnets", "swav.swav_resnet"])
def test_lightning_bolts(module: str) -> None:
    basic, bottleneck = (
        copy_of(getattr(resnet, name), f"pl_bolts.models.self_supervised.{module}.{name}")
        for name in ("BasicBlock", "Bottleneck")
    )
    torch.manual_seed(0)
    model = nn.Sequential(basic(8, 8), bottleneck(8, 4, 2, projection(8, 16, 2)))
    assert_trains_as_eager(settled(model), pictures())
    rows = explain(fuse(model))
    assert [(row.block, row.backend) for row in rows] == [("BasicBlock", "native"), ("Bottleneck", "native")]
