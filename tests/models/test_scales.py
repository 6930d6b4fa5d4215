"""Scaled residuals as models take them: what is stored, and that fused blocks compute and train as eager ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import fuse, models, unfuse
from resnet_fused.scaling import Learnable, depth_scale

SHORT: dict[str, Any] = {"layers": (2, 1, 1, 1), "num_classes": 5, "width": 16}
SCALES: dict[str, dict[str, Any]] = {
    "numbers": {"branch_scale": 0.3, "skip_scale": 0.7},
    "by depth": {"branch_scale": depth_scale},
    "learned scalar": {"branch_scale": Learnable(0.5)},
    "learned per channel": {"branch_scale": Learnable(0.5, per_channel=True)},
    "both learned": {"branch_scale": Learnable(0.4, per_channel=True), "skip_scale": Learnable(0.8)},
}
scaled = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
factories = pytest.mark.parametrize("name", ["resnet18", "resnet50"])
orders = pytest.mark.parametrize("order", ["post", "pre"])


def pictures(n: int = 2, size: int = 48) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@scaled
@factories
@orders
def test_scaled_models_train_as_eager(name: str, order: str, scales: dict[str, Any]) -> None:
    """In fp64 to 1e-9, in fp32 to twice eager's error (`assert_trains_as_eager`): outputs, every gradient, buffers."""
    torch.manual_seed(0)
    assert_trains_as_eager(getattr(models, name)(order=order, **scales, **SHORT), pictures())


@orders
def test_under_autocast(order: str) -> None:
    torch.manual_seed(0)
    model = models.resnet18(order=order, **SCALES["both learned"], **SHORT)
    assert_trains_as_eager(model, pictures(4), autocast=torch.bfloat16)


@orders
def test_in_bfloat16(order: str) -> None:
    """Weights and pictures, too. Without ReLUs, some of which rounding flips, and without statistics of few values."""
    torch.manual_seed(0)
    scales = {"branch_scale": Learnable(0.3, per_channel=True), "skip_scale": Learnable(0.8)}
    model = models.small_resnet(8, order=order, norm_layer=lambda width: nn.Identity(), **scales).bfloat16()
    for module in model.modules():
        if hasattr(module, "relu"):
            module.relu = nn.Identity()
    assert_trains_as_eager(model, pictures(4, 8).bfloat16())


@pytest.mark.parametrize("order", ["post", "pre"])
def test_a_block_is_the_formula(order: str) -> None:
    """(1 - beta) S(x) + alpha g(x), taken from the block's own children; to fp64 rounding."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"branch_scale": 0.25, "skip_scale": Learnable(0.75, per_channel=True)}
    net = models.small_resnet(8, order=order, **options).double().eval()
    block = net.layer2[0]
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        block.skip_scale.uniform_(0.5, 1)
        if order == "post":
            branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            skip = block.downsample(x)
        else:
            activated = torch.relu(block.bn1(x))
            branch = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
            skip = block.downsample(activated)
        expected = 0.25 * branch + block.skip_scale.view(-1, 1, 1) * skip
        expected = torch.relu(expected) if order == "post" else expected
        for each in (block, unfuse(copy.deepcopy(block))):
            torch.testing.assert_close(each(x), expected, rtol=1e-12, atol=1e-12)


def test_only_learnable_scales_are_stored() -> None:
    plain = models.resnet18(fused=False, **SHORT).state_dict()
    numbers = models.resnet18(fused=False, **SCALES["numbers"], **SHORT).state_dict()
    learned = models.resnet18(fused=False, **SCALES["both learned"], **SHORT).state_dict()
    assert list(numbers) == list(plain)
    added = {name: tuple(value.shape) for name, value in learned.items() if name not in plain}
    blocks = {"layer1.0": 16, "layer1.1": 16, "layer2.0": 32, "layer3.0": 64, "layer4.0": 128}
    expected = {f"{block}.branch_scale": (width,) for block, width in blocks.items()}
    assert added == expected | {f"{block}.skip_scale": (1,) for block in blocks}


def test_learned_scales_receive_gradients_and_move() -> None:
    torch.manual_seed(0)
    model = models.small_resnet(14, branch_scale=Learnable(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pictures(4, 8)).square().mean().backward()
    optimizer.step()
    assert all(model.get_parameter(f"layer{i}.{j}.branch_scale").item() != 0 for i in (1, 2, 3) for j in (0, 1))


def test_a_scale_of_zero_starts_the_block_as_its_skip_path() -> None:
    """ReZero, post-activation: relu(x) = x behind the stem's ReLU; no rounding."""
    model = models.small_resnet(8, branch_scale=Learnable()).eval()
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(model.layer1(x), x)


def test_a_function_is_told_the_number_of_blocks() -> None:
    told: list[int] = []

    def choose(blocks: int) -> Learnable:
        told.append(blocks)
        return Learnable(depth_scale(blocks), per_channel=True)

    model = models.resnet18(branch_scale=choose, **SHORT)
    assert told == [5]
    assert torch.equal(model.layer4[0].branch_scale.data, torch.full((128,), 1 / math.sqrt(5)))
    assert models.resnet50(fused=False, branch_scale=depth_scale, width=16).layer1[0].branch_scale == 0.25  # 16 blocks


def test_a_scale_may_be_written_later() -> None:
    """The kept description and the kept folded weights follow."""
    model = models.small_resnet(8).eval()
    x = pictures(2, 8)
    with torch.no_grad():
        before = model(x)
        model.layer1[0].branch_scale = 0.0
        after = model(x)
        expected = unfuse(copy.deepcopy(model))(x)
        model.layer1[0].branch_scale = nn.Parameter(torch.ones(1))
        again = model(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(again, before)


def test_scaled_models_copy_and_trace() -> None:
    model = models.small_resnet(8, **SCALES["both learned"]).eval()
    x = pictures(2, 8)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        plain = unfuse(copy.deepcopy(model))
        torch.testing.assert_close(torch.fx.symbolic_trace(plain)(x), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="initial must be finite"):
        Learnable(bad)


@pytest.mark.parametrize("bad", [0, -3, 2.5])
def test_a_depth_that_is_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="blocks must be a positive int, got"):
        depth_scale(bad)


def test_scales_of_a_path_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"skip=False leaves no path for .*skip_scale=0.5"):
        models.BasicBlock(8, 8, skip=False, skip_scale=0.5)
    with pytest.raises(ValueError, match="skip=False leaves no path"):
        models.Bottleneck(8, 8, downsample=nn.Sequential(), skip=False)


def test_fusing_a_model_that_was_scaled_by_hand() -> None:
    model = models.resnet18(fused=False, **SHORT)
    for block in (*model.layer1, *model.layer3):
        block.branch_scale = 2.0
    expected = model.eval()(pictures())
    torch.testing.assert_close(fuse(model)(pictures()), expected, rtol=1e-4, atol=1e-4)  # fp32 in two layouts
