"""Effective receptive fields: against the formula for linear chains, and what a map's numbers mean."""

from __future__ import annotations

import json
import math

import pytest
import torch

import resnet_fused
from resnet_fused.analysis import receptive_field as rf
from resnet_fused.analysis.blocks import settle_statistics
from resnet_fused.analysis.geometry import geometry
from resnet_fused.models import BasicBlock, ResNet


@pytest.mark.parametrize("skip", ["none", "identity"])
@pytest.mark.parametrize("depth", [5, 10])
def test_of_linear_chains_it_is_the_formula(depth: int, skip: str) -> None:
    """Eight draws of 64 filters a layer leave about 2 % of noise; without the skip's half it would be off by 41 %."""
    found = rf.chain_field(depth, skip)  # type: ignore[arg-type]
    assert found.formula == math.sqrt(depth * 8 / 12 * (0.5 if skip == "identity" else 1))
    assert found.field.sigma == pytest.approx(found.formula, rel=0.06)
    assert found.field.theoretical == 2 * depth + 1


def test_numbers_of_a_gaussian_map() -> None:
    sigma, places = 9.0, torch.arange(101, dtype=torch.float64)
    line = torch.exp(-((places - 50) ** 2) / (2 * sigma**2))
    energy = torch.outer(line, line)
    found = rf.describe_map(energy / energy.sum(), "gaussian", 101, (50.0, 50.0))
    assert found.sigma == pytest.approx(sigma, rel=1e-4)  # the tails beyond 5 sigma are cut
    for share, radius in zip(rf.SHARES, found.radii, strict=True):
        assert radius == pytest.approx(sigma * math.sqrt(-2 * math.log(1 - share)), abs=0.7)  # a pixel's half diagonal
    assert found.mean == pytest.approx((50, 50), abs=1e-9)


def small(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = resnet_fused.fuse(ResNet(BasicBlock, (2, 2, 1, 1), num_classes=2))
    settle_statistics(model, torch.randn(4, 3, 96, 96))
    return model.eval()


def test_the_map_lies_within_the_theoretical_field() -> None:
    model = small()
    found = rf.effective_field(model, "layer2.0", size=96, inputs=2)
    axis = geometry(model, 96, compare=False).output("layer2.0")[0]
    low, high = (round(end + axis.size // 2 * axis.jump) for end in (axis.low, axis.high))
    assert found.theoretical == high - low + 1 == 67
    inside = found.map[max(low, 0) : high + 1, max(low, 0) : high + 1]
    assert float(inside.sum()) == pytest.approx(1, abs=1e-12) and float(inside[0].sum()) < float(inside[33].sum())
    assert found.centre == (48, 48) and found.radii[0] < found.radii[1] < found.radii[2]


def test_skips_focus_the_field() -> None:
    """Luo et al., section 3: skip connections make the effective field smaller. Here by about 15 %."""
    found = rf.effective_fields(small(), "layer2.1", size=96, inputs=4)
    with_skips, without = found.rows
    assert with_skips.sigma < 0.95 * without.sigma and with_skips.theoretical == without.theoretical
    assert "sigma px" in found.table()
    told = json.loads(json.dumps(found.to_dict()))
    assert told["missing"] is None and "map" not in told["fields"][0]


def test_the_default_layer_is_the_last_whose_field_the_picture_holds() -> None:
    assert rf.effective_field(small(), size=96, inputs=1).theoretical == 67  # layer2.0; layer2.1 would need 99


def test_bad_input() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"no layer with a grid is named 'layer2.7' .*near: 'layer2"):
        rf.effective_field(model, "layer2.7", size=64)
    with pytest.raises(ValueError, match="input is 16 x 16, smaller than the total stride 32"):
        rf.effective_field(model, "layer2.0", size=16)
    with pytest.raises(ValueError, match="inputs is 0; accepted: 1 or more"):
        rf.effective_field(model, "layer2.0", size=64, inputs=0)
    with pytest.raises(ValueError, match=r"in training mode, .*accepted: model.eval"):
        rf.effective_field(model.train(), "layer2.0", size=64)
