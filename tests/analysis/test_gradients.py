"""Gradient norms by depth: chains against their formula, models against autograd by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from resnet_fused.analysis import gradients
from resnet_fused.analysis.blocks import without_skips
from resnet_fused.errors import NotFusable
from resnet_fused.models import BasicBlock, ResNet
from resnet_fused.modules.fused_block import FusedBlock

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("a", "depth", "skip", "value"),
    [
        (0.9, 20, "none", 0.9**20),  # 0.12
        (0.9, 100, "none", 0.9**100),  # 2.7e-5
        (0.5, 20, "none", 0.5**20),
        (0.5, 20, "identity", 1.5**20),
        (-0.9, 3, "none", -(0.9**3)),
    ],
)
def test_a_chain_of_fused_blocks_has_the_gradient_of_its_formula(a: float, depth: int, skip: str, value: float) -> None:
    measured = gradients.chain_gradient(a, depth, skip)  # type: ignore[arg-type]
    # each block multiplies and adds once, and rounds each time
    assert measured == pytest.approx(value, rel=2 * depth * EPS)


def test_the_numbers_of_the_table() -> None:
    rows = {(row.a, row.depth): row for row in gradients.chain_gradients().rows}
    assert rows[0.9, 20].plain == pytest.approx(0.12, rel=0.02)  # as rounded to two digits in the text
    assert rows[0.9, 100].plain == pytest.approx(2.7e-5, rel=0.02)
    assert rows[0.5, 20].residual_over_plain == pytest.approx(3**20, rel=80 * EPS)
    assert rows[0.5, 20].residual_over_plain == pytest.approx(3.5e9, rel=0.01)
    table = gradients.chain_gradients().table()
    assert "0.1216" in table and "2.656e-05" in table and "3.487e+09" in table


def small() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5)


def test_norms_are_those_of_autograd() -> None:
    """Of the unfused model in float64, by retained gradients; the fused one computes the same up to rounding."""
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    model = small().double()
    found = gradients.gradients_by_depth(resnet_fused.fuse(small().double()), x, labels, steps=1)
    assert found.blocks == ("layer1.0", "layer2.0", "layer3.0", "layer4.0")

    def by_hand(model: nn.Module) -> list[float]:
        kept = []
        u = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            u = layer(u)
            u.retain_grad()
            kept.append(u)
        F.cross_entropy(model.fc(u.mean((2, 3))), labels).backward()
        return [float(u.grad.norm()) for u in kept]  # type: ignore[union-attr]

    # float64 through ten layers, reordered sums: far below the four digits that the table shows
    assert found.residual_start == pytest.approx(by_hand(model), rel=1e-9)
    assert found.plain_start == pytest.approx(by_hand(without_skips(small().double())), rel=1e-9)
    assert found.residual_end != found.residual_start and found.plain_end != found.plain_start
    assert found.first_over_last["plain_start"] == found.plain_start[0] / found.plain_start[3]  # type: ignore[index]
    assert "layer3.0" in found.table() and json.loads(json.dumps(found.to_dict()))["steps"] == 1


def test_the_model_is_left_as_it_was() -> None:
    model = resnet_fused.fuse(small())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients.gradients_by_depth(model, torch.randn(2, 3, 64, 64), torch.tensor([0, 1]), steps=1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_plain_blocks_run_fused_and_compute_the_branch() -> None:
    model = resnet_fused.fuse(small().double()).eval()
    plain = without_skips(model)
    assert sum(isinstance(module, FusedBlock) for module in plain.modules()) == 4
    block, alone, x = model.layer2[0], plain.layer2[0], torch.randn(2, 64, 8, 8, dtype=torch.float64)
    branch = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    # two convolutions of 64 and 128 channels in float64
    torch.testing.assert_close(alone(x), branch.relu(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(resnet_fused.unfuse(plain).layer2[0](x), branch.relu(), rtol=1e-10, atol=1e-12)


def test_a_plain_model_has_no_skips_to_take_out() -> None:
    plain = without_skips(small())
    with pytest.raises(NotFusable, match="none of the 4 blocks of this ResNet has a skip path"):
        without_skips(plain)


def test_without_an_adapter_only_the_residual_network_is_measured() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Own(), Own(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    found = gradients.gradients_by_depth(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), steps=0)
    assert found.plain_start is None and "Own is an unknown block class" in found.table()
    assert all(math.isfinite(norm) and norm > 0 for norm in found.residual_start)


def test_bad_input() -> None:
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="this Sequential has no residual block; accepted"):
        gradients.gradients_by_depth(nn.Sequential(nn.Conv2d(3, 4, 3)), x, labels)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        gradients.gradients_by_depth(small(), x, labels, steps=-1)
    headless = small()
    headless.fc = nn.Unflatten(1, (512, 1))
    with pytest.raises(ValueError, match=r"output has shape \[2, 512, 1\]; accepted: logits \[2, classes\]"):
        gradients.gradients_by_depth(headless, x, labels)
