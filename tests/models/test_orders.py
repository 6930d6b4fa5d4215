"""Pre-activation ResNets (v2), plain networks, and the models for small pictures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse, models, unfuse
from resnet_fused.modules.fused_block import FusedModule

SHORT: dict[str, Any] = {"layers": (2, 1, 1, 1), "num_classes": 5, "width": 16}
KINDS: dict[str, dict[str, Any]] = {
    "pre": {"order": "pre"},
    "plain": {"skip": False},
    "plain pre": {"order": "pre", "skip": False},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
factories = pytest.mark.parametrize("name", ["resnet18", "resnet50"])


def pictures(n: int = 2, size: int = 48) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@kinds
@factories
def test_each_order_trains_as_eager(name: str, kind: dict[str, Any]) -> None:
    """In fp64 to 1e-9, in fp32 to twice eager's error: outputs, gradients, buffers, evaluation."""
    torch.manual_seed(0)
    assert_trains_as_eager(getattr(models, name)(**kind, **SHORT), pictures(4))


@kinds
def test_each_order_under_autocast_and_with_low_memory(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = models.resnet18(**kind, **SHORT)
    assert_trains_as_eager(model, pictures(4), autocast=torch.bfloat16)
    assert_trains_as_eager(model, pictures(4), memory="low")


@kinds
@factories
def test_every_block_is_fused(name: str, kind: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = getattr(models, name)(**kind, num_classes=5)
    rows = explain(model)
    assert rows.summary == f"{len(rows)} of {len(rows)} blocks fused"
    assert len(rows) == 1 + sum(len(getattr(model, f"layer{i}")) for i in range(1, 5))
    assert all(row.reason == "" for row in rows)


def test_v2_is_the_papers() -> None:
    """arXiv:1603.05027: figure 4e, and the appendix on the first activation and the last."""
    torch.manual_seed(0)
    model = models.resnet18(fused=False, order="pre", **SHORT).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    x = pictures().double()

    def unit(block: Any, x: Tensor, activated: Tensor) -> Tensor:
        branch = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
        return branch + (x if block.downsample is None else block.downsample[0](activated))

    with torch.no_grad():
        u = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
        blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
        u = unit(blocks[0], u, u)
        for block in blocks[1:]:
            u = unit(block, u, torch.relu(block.bn1(u)))
        u = torch.relu(model.norm(u)).mean((2, 3))
        expected = model.fc(u)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)  # the same operations in fp64
        torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-9, atol=1e-9)


def test_state_names() -> None:
    post = list(models.resnet50(fused=False, **SHORT).state_dict())
    pre = list(models.resnet50(fused=False, order="pre", **SHORT).state_dict())
    plain = list(models.plain50(fused=False, **SHORT).state_dict())
    assert plain == [name for name in post if ".downsample." not in name]
    gone = {name for name in post if ".downsample.1." in name or name.startswith("layer1.0.bn1.")}
    norm = {f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(pre) == set(post) - gone | norm


@pytest.mark.parametrize("part", ["norm", "relu"])
def test_hooks_on_the_last_activation_run(part: str) -> None:
    model, calls = models.small_resnet(8, order="pre").eval(), []
    getattr(model, part).register_forward_hook(lambda *_: calls.append(part))
    model(pictures(2, 8))
    assert part in calls


@pytest.mark.parametrize("end", [nn.GroupNorm(4, 64), nn.Identity()], ids=str)
def test_another_last_norm(end: nn.Module) -> None:
    torch.manual_seed(0)
    model = models.small_resnet(8, fused=False, order="pre")
    model.norm = end
    assert_trains_as_eager(model, pictures(4, 8))


def test_without_norms() -> None:
    """As for i-ResNets and at initialisation in theory: the ReLU before a convolution must not write into x."""
    torch.manual_seed(0)
    model = models.small_resnet(8, order="pre", norm_layer=lambda width: nn.Identity(), branch_scale=0.1)
    assert explain(model).summary == "3 of 3 blocks fused"
    assert_trains_as_eager(model, pictures(4, 8))


def test_zero_init_residual_of_v2() -> None:
    """Zeros in the last convolution: the block is its skip path."""
    model = models.small_resnet(8, order="pre", zero_init_residual=True).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.layer1(x), x)
    with pytest.raises(ValueError, match="without a skip path the output would be zero"):
        models.plain18(zero_init_residual=True)


@pytest.mark.parametrize(("depth", "convs"), [(8, 7), (20, 19), (50, 49)])
def test_small_resnets_have_the_layers_they_are_named_for(depth: int, convs: int) -> None:
    """Projections apart, as in the paper; the linear layer is the last."""
    model = models.small_resnet(depth, fused=False)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(names) == convs
    assert isinstance(model.fc, nn.Linear)
    assert model.fc.in_features == 64


@pytest.mark.parametrize("stem", ["small", "large"])
def test_small_pictures_of_one_channel(stem: str) -> None:
    torch.manual_seed(0)
    model = models.small_resnet(8, in_channels=1, stem=stem)
    assert_trains_as_eager(model, pictures(4, 16)[:, :1])


def test_arguments_that_fit_no_model() -> None:
    with pytest.raises(ValueError, match=r"depth=21; accepted: 6 n \+ 2"):
        models.small_resnet(21)
    with pytest.raises(ValueError, match="got order='middle'"):
        models.resnet18(order="middle")
    with pytest.raises(ValueError, match="stem='tiny'"):
        models.resnet18(stem="tiny")


def test_a_v2_projection_with_a_norm_stays_unfused() -> None:
    model = models.small_resnet(8, fused=False, order="pre")
    model.layer2[0].downsample.append(nn.BatchNorm2d(32))
    expected = copy.deepcopy(model).eval()(pictures(2, 8))
    rows = explain(fuse(model))
    (row,) = (row for row in rows if row.name == "layer2.0")
    assert "downsample has more than one part; accepted in pre-activation order: nn.Sequential(conv)" in row.reason
    torch.testing.assert_close(model.eval()(pictures(2, 8)), expected, rtol=1e-4, atol=1e-4)  # fp32
    assert not any(isinstance(m, FusedModule) for m in unfuse(model).modules())
