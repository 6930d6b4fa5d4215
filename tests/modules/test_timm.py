"""timm's ResNets, fused: what is, what is not and why, and that both compute as before."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from support.training import assert_trains_as_eager, train
from torch import Tensor, nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.stem import FusedStem

timm = pytest.importorskip("timm")
resnet = pytest.importorskip("timm.models.resnet")


def short(block: type[nn.Module] = resnet.BasicBlock, **arguments: Any) -> nn.Module:
    """A small model, weights away from timm's zero-initialised last norms."""
    torch.manual_seed(0)
    channels = (32, 64, 96, 128)
    return resnet.ResNet(block, (2, 1, 1, 1), num_classes=5, channels=channels, zero_init_last=False, **arguments)


def pictures(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_resnet18_trains_as_eager(autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    assert_trains_as_eager(model, pictures(4, 48), steps=5, autocast=autocast)


VARIANTS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "resnext": {"cardinality": 32, "base_width": 4},
    "wide": {"base_width": 128},
    "dilated": {"output_stride": 8},
    "squeeze-excitation": {"block_args": {"attn_layer": "se"}},
    "effective squeeze-excitation": {"block_args": {"attn_layer": "ese"}},
    "efficient channel attention": {"block_args": {"attn_layer": "eca"}},
    "attention to the maximum": {
        "block_args": {"attn_layer": functools.partial(timm.layers.SEModule, add_maxpool=True)}
    },
    "stochastic depth": {"drop_path_rate": 0.5},
    "both, in every block": {"drop_path_rate": 0.5, "block_args": {"attn_layer": "se"}},
    "3x3 downsample, narrow first convolution": {"down_kernel_size": 3, "block_reduce_first": 2},
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_fused_whole_and_train_as_eager(arguments: dict[str, Any]) -> None:
    model = short(resnet.Bottleneck, **arguments)
    assert_trains_as_eager(model, pictures(4, 48))
    rows = explain(fuse(model))
    assert [row.block for row in rows] == ["ResNet"] + ["Bottleneck"] * 5
    assert not any("accepted" in row.reason for row in rows)
    assert all(isinstance(module, FusedModule) for module in [model, model.layer1[0], model.layer4[0]])
    assert type(unfuse(model)) is resnet.ResNet


# For each argument of timm's ResNet: a part of the reason that explain gives, and the blocks that it concerns.
REFUSED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "activation": ({"act_layer": "selu"}, "stages[0].act is SELU", {"", "layer1.0", "layer1.1", "layer4.0"}),
    "norm": ({"norm_layer": "groupnorm"}, "stages[0].norm is GroupNorm", {"", "layer1.0", "layer1.1", "layer4.0"}),
}


@pytest.mark.parametrize(("arguments", "reason", "names"), REFUSED.values(), ids=REFUSED)
def test_parts_without_a_fused_form_are_named(arguments: dict[str, Any], reason: str, names: set[str]) -> None:
    model = short(**arguments)
    refused = {row.name for row in explain(fuse(model)) if reason in row.reason}
    assert names <= refused
    for name, module in model.named_modules():
        if isinstance(module, (resnet.BasicBlock, resnet.ResNet)):
            assert isinstance(module, FusedModule) is (name not in refused)


@pytest.mark.parametrize("stem", [{"stem_type": "deep"}, {"stem_type": "deep_tiered", "replace_stem_pool": True}])
def test_a_deep_stem_is_one_chain(stem: dict[str, Any]) -> None:
    """resnet50d's kind, with average-pooling downsample, and resnetrs50's, whose pooling is a convolution."""
    model = short(resnet.Bottleneck, stem_width=32, avg_down=True, **stem)
    assert_trains_as_eager(model, pictures())
    fuse(model)
    assert isinstance(model, FusedStem)
    assert len(model.fused_describe().calls[0].spec.stages) == (4 if "replace_stem_pool" in stem else 3)
    assert all(isinstance(block, FusedModule) for block in (model.layer1[0], model.layer1[1], model.layer2[0]))
    assert not any("accepted" in row.reason for row in explain(model))


def test_a_stem_whose_pooling_blurs() -> None:
    model = short(aa_layer=timm.layers.BlurPool2d)
    assert_trains_as_eager(model, pictures())
    (row,) = (row for row in explain(fuse(model)) if row.name == "")
    assert row.backend == "native" and "maxpool is Sequential" in row.reason


def test_gradient_checkpointing_is_kept() -> None:
    """A checkpointed block starts once more, in backward."""
    calls: list[str] = []
    plain, model = fuse(short()), fuse(short())
    model.set_grad_checkpointing()
    for name in ("layer1", "layer4"):
        getattr(model, name)[0].register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    expected, got = train(plain, pictures()), train(model, pictures())
    assert calls == ["layer1", "layer4", "layer4", "layer1", "layer1", "layer4"]  # forward, backward, evaluation
    for name, value in expected.items():
        if "gradient" in name or name == "output":
            torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_the_other_ways_through_the_model() -> None:
    model = short().eval()
    fused = fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused.forward_features(pictures()), model.forward_features(pictures()))
    final, features = fused.forward_intermediates(pictures())
    expected_final, expected = model.forward_intermediates(pictures())
    torch.testing.assert_close((final, features), (expected_final, expected))
    for each in (model, fused):
        each.reset_classifier(3)
    assert fused(pictures()).shape == (2, 3)


def test_frozen_batch_norm() -> None:
    """timm's freezing replaces BatchNorm2d by torchvision's FrozenBatchNorm2d."""
    model = timm.layers.freeze_batch_norm_2d(short())
    assert_trains_as_eager(model, pictures())
    rows = explain(fuse(model))
    assert len(rows) == 6
    assert not any("accepted" in row.reason for row in rows)
