"""Kinks along a segment: the exact count against a fine sampling, paths, and models."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused.analysis import kinks
from resnet_fused.analysis.blocks import without_skips
from resnet_fused.analysis.chains import Chain, relu_chain, scalar_chain


def segment(width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 1, width, 1, 1, generator=generator, dtype=torch.float64)
    return start, end


def sampled(chain: Chain, start: Tensor, end: Tensor, steps: int = 50_000) -> int:
    """Sign changes at equal steps, in plain PyTorch."""
    x = torch.lerp(start, end, torch.linspace(0, 1, steps + 1, dtype=torch.float64).reshape(-1, 1, 1, 1))
    count = 0
    for params, spec in chain.blocks:
        z = F.conv2d(x, params.stages[0].weight, params.stages[0].bias)
        count += int(((z[1:] < 0) != (z[:-1] < 0)).sum())
        g = F.conv2d(z.relu(), params.stages[1].weight)
        x = x + g if spec.skip == "identity" else g
    return count


@pytest.mark.parametrize("skip", ["none", "identity"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_exact_count_is_that_of_a_fine_sampling(skip: str, seed: int) -> None:
    """At 50,000 steps none of these segments has two kinks of one unit within a step."""
    chain = relu_chain(5, 8, skip, seed)  # type: ignore[arg-type]
    start, end = segment(8, seed)
    found = kinks.chain_kinks(chain, start, end)
    assert len(found) == sampled(chain, start, end) > 0
    assert torch.equal(found, found.sort().values) and found[0] > 0 and found[-1] < 1


def test_between_kinks_the_function_is_linear_and_at_each_it_is_not() -> None:
    chain, (start, end) = relu_chain(3, 6, "identity", 4), segment(6, 4)
    at = kinks.chain_kinks(chain, start, end)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), at, torch.ones(1, dtype=torch.float64)])

    def value(t: Tensor) -> Tensor:
        return chain(torch.lerp(start, end, t.reshape(-1, 1, 1, 1))).flatten(1)

    low, high = edges[:-1], edges[1:]
    bend = value((low + high) / 2) - (value(low) + value(high)) / 2
    assert bend.abs().max() < 1e-13 * value(edges).abs().max() * 10  # float64, three blocks of six channels
    step = 1e-6
    slopes = (value(at + step) - value(at)) - (value(at) - value(at - step))
    assert (slopes.abs().amax(1) > 1e-4 * step).all()  # a kink changes the slope by far more than rounding does


def test_paths_of_the_unravelled_network() -> None:
    found = kinks.kinks_by_depth((1, 4, 8), width=8, segments=3)
    for row in found.rows:
        counts = dict(row.paths)
        assert counts[0] == 0.0, "the identity path has no kink at any depth"
        assert counts[row.depth] == row.plain, "the path through every branch is the plain network"
    plain = [row.plain for row in found.rows]
    assert plain == sorted(plain) and plain[2] > 3 * plain[0], "kinks grow with depth"
    chain, ends = relu_chain(4, 8, "identity", 0), segment(8, 0)
    assert len(kinks.chain_kinks(chain.path([]), *ends)) == 0
    assert len(kinks.chain_kinks(chain.path([0, 1, 2, 3]), *ends)) == len(
        kinks.chain_kinks(chain.with_skip("none"), *ends)
    )
    assert "identity path" in found.table() and json.loads(json.dumps(found.to_dict()))["width"] == 8


class Curve(nn.Module):
    """relu(x - 1/4) + relu(x - 3/4): kinks where both are known."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x - 0.25) + self.relu(x - 0.75)


def test_a_model_is_sampled_and_left_as_it_was() -> None:
    model = Curve().train()
    found = kinks.model_kinks(model, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 64)
    assert (found.kinks, found.units, found.layers, found.half) == ((1, 1), (1, 1), ("relu", "relu"), 2)
    assert model.training and not model.relu._forward_pre_hooks


def test_of_a_fused_model_it_sees_every_activation() -> None:
    torch.manual_seed(0)
    model = resnet_fused.models.resnet18(num_classes=3)
    start, end = torch.randn(2, 1, 3, 32, 32)
    rows = tuple(kinks.model_kinks(m, start, end, 8, n) for n, m in (("net", model), ("plain", without_skips(model))))
    for row in rows:
        assert len(row.layers) == 17 and row.units[0] == 64 * 16 * 16
        assert 0 < row.half <= row.total < sum(row.units) * 8
    eager = kinks.model_kinks(resnet_fused.unfuse(model), start, end, 8)
    assert eager.kinks == rows[0].kinks
    assert "17" in kinks.ModelsKinks("resnet18", rows).table()


def test_bad_input() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="resolution is 3; accepted: an even number of steps"):
        kinks.model_kinks(Curve(), x, x, 3)
    with pytest.raises(ValueError, match="no activation module with a kink; accepted: kinks at 0, of ReLU"):
        kinks.model_kinks(nn.Sequential(nn.SiLU()), x, x)
    with pytest.raises(ValueError, match="the model has ReLU6; accepted"):
        kinks.model_kinks(nn.Sequential(nn.ReLU6()), x, x)
    with pytest.raises(ValueError, match="accepted: convolution, relu, convolution without norms"):
        kinks.chain_kinks(scalar_chain(0.5, 1, "none"), x.double(), x.double())
