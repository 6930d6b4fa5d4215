"""Inverted residuals of timm and torchvision: fused whole, and trained as eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import library_blocks
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fused_block import FusedBlock
from resnet_fused.testing import assert_equivalent
from resnet_fused.tools.coverage import pairs, unfused

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
blocks = pytest.importorskip("timm.models._efficientnet_blocks")
from timm.layers import BatchNormAct2d, BlurPool2d  # noqa: E402
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3  # noqa: E402

SE = partial(blocks.SqueezeExcite, gate_layer=nn.Hardsigmoid)


def mobile_v3(in_channels: int, out: int, stride: int, se: bool = True, act: str = "HS", expand: int = 24) -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig(in_channels, 5, expand, out, se, act, stride, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def mb_conv(kind: str, expand: float, in_channels: int, out: int, stride: int) -> nn.Module:
    config = getattr(efficientnet, f"{kind}Config")(expand, 3, stride, in_channels, out, 1)
    return getattr(efficientnet, kind)(config, 0.5, nn.BatchNorm2d)


# name: (what makes it, how many fused calls)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MobileNetV2": (lambda: mobilenetv2.InvertedResidual(16, 16, 1, 4), 1),
    "MobileNetV2, stride, not expanded": (lambda: mobilenetv2.InvertedResidual(16, 24, 2, 1), 1),
    "MobileNetV3": (lambda: mobile_v3(8, 8, 1), 2),
    "MobileNetV3, stride, no attention": (lambda: mobile_v3(8, 16, 2, se=False, act="RE"), 1),
    "MobileNetV3, not expanded": (lambda: mobile_v3(24, 8, 2, expand=24), 2),
    "MBConv": (lambda: mb_conv("MBConv", 4, 8, 8, 1), 2),
    "MBConv, stride": (lambda: mb_conv("MBConv", 4, 8, 16, 2), 2),
    "FusedMBConv": (lambda: mb_conv("FusedMBConv", 4, 8, 8, 1), 1),
    "FusedMBConv, not expanded": (lambda: mb_conv("FusedMBConv", 1, 8, 8, 1), 1),
    "MNASNet": (lambda: mnasnet._InvertedResidual(8, 8, 5, 1, 3), 1),
    "inverted": (lambda: blocks.InvertedResidual(8, 8, 5, exp_ratio=3, act_layer=nn.SiLU, drop_path_rate=0.5), 1),
    "inverted, attention": (
        lambda: blocks.InvertedResidual(8, 8, exp_ratio=3, act_layer=nn.SiLU, se_layer=SE, drop_path_rate=0.5),
        2,
    ),
    "inverted, stride, dilation": (lambda: blocks.InvertedResidual(8, 16, 3, 2, 2, exp_ratio=3), 1),
    "inverted, anti-aliased": (
        lambda: blocks.InvertedResidual(8, 16, 3, 2, exp_ratio=3, se_layer=SE, aa_layer=BlurPool2d),
        2,
    ),
    "separable": (lambda: blocks.DepthwiseSeparableConv(8, 8, se_layer=SE, act_layer=nn.Hardswish), 2),
    "separable, activated": (
        lambda: blocks.DepthwiseSeparableConv(8, 8, pw_act=True, act_layer=nn.Hardswish, drop_path_rate=0.5),
        1,
    ),
    "edge": (lambda: blocks.EdgeResidual(8, 8, exp_ratio=3, act_layer=nn.SiLU, se_layer=SE), 2),
    "one convolution, added": (lambda: blocks.ConvBnAct(8, 8, 3, skip=True, act_layer=nn.SiLU), 1),
    "universal": (
        lambda: blocks.UniversalInvertedResidual(8, 8, 3, 5, 3, exp_ratio=3, se_layer=SE, layer_scale_init_value=0.5),
        2,
    ),
    "universal, extra depthwise": (lambda: blocks.UniversalInvertedResidual(8, 8, 5, 0, drop_path_rate=0.5), 1),
    "universal, feed-forward": (lambda: blocks.UniversalInvertedResidual(8, 16, 0, 0, exp_ratio=3), 1),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    model = library_blocks.made(make)
    block = model[0]
    if isinstance(block, blocks.UniversalInvertedResidual) and not isinstance(block.dw_start, nn.Identity):
        block.dw_start.bn.bias.requires_grad_(False)  # whose gradient is zero: the norm behind pw_exp takes it away
    return model


def given(model: nn.Module, size: int = 9) -> Tensor:
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_whole_and_trained_as_eager(name: str) -> None:
    make, calls = BLOCKS[name]
    model = made(make)
    x = given(model)
    assert_trains_as_eager(model, x)
    convs = pairs(copy.deepcopy(model).eval(), x)
    fuse(model)
    assert convs and not unfused(model, convs)
    assert len(model[0].fused_describe().calls) == calls
    assert {row.backend for row in explain(model)} == {"native"}


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3", "MBConv", "inverted, attention", "universal"])
def test_under_autocast(name: str) -> None:
    model = made(BLOCKS[name][0])
    assert_trains_as_eager(model, given(model), autocast=torch.bfloat16)


# Whole networks, narrow and short.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm's MobileNetV3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "timm's EfficientNet": lambda: timm.models.EfficientNet(
        timm.models._efficientnet_builder.decode_arch_def(
            [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e3_c16_se0.25"], ["er_r1_k3_s2_e2_c16"], ["cn_r1_k1_s1_c24"]]
        ),
        num_classes=5,
        stem_size=8,
        num_features=32,
        act_layer=nn.SiLU,
    ),
    "torchvision's MobileNetV2": lambda: torchvision.models.MobileNetV2(
        5, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]], dropout=0.0
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    assert_equivalent(model, torch.randn(4, 3, 32, 32), seeds=1)
    fuse(model)
    kinds = ("InvertedResidual", "DepthwiseSeparableConv", "EdgeResidual")
    left = [m for m in model.modules() if type(m).__name__ in kinds and not isinstance(m, FusedBlock)]
    assert not left


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "space to depth": (
        lambda: blocks.InvertedResidual(8, 16, exp_ratio=1, s2d=1, dw_kernel_size=5),
        "stages[0].conv is Conv2dSame",
    ),
    "convolutions that pad one side": (
        lambda: blocks.InvertedResidual(8, 8, stride=2, pad_type="same", exp_ratio=2),
        "stages[1].conv is Conv2dSame",
    ),
    "another norm": (
        lambda: mobilenetv2.InvertedResidual(8, 8, 1, 2, norm_layer=partial(nn.GroupNorm, 2)),
        "Conv2d, GroupNorm; accepted",
    ),
    "another attention": (
        lambda: blocks.InvertedResidual(8, 8, exp_ratio=2, se_layer=lambda *_, **__: nn.Dropout2d()),
        "se is Dropout2d",
    ),
    "an activation behind the only convolution": (
        lambda: blocks.ConvBnAct(8, 16, 3, act_layer=nn.SiLU),
        "a layer on its own is faster in PyTorch",
    ),
    "a blur behind the only convolution": (
        lambda: blocks.ConvBnAct(8, 16, 3, stride=2, aa_layer=BlurPool2d),
        "aa is BlurPool2d",
    ),
}


@pytest.mark.filterwarnings("ignore:fuse left")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_fused_form_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    assert reason in explain(fuse(nn.Sequential(make())))[0].reason


def test_norms_that_activate() -> None:
    block = blocks.InvertedResidual(8, 8, exp_ratio=2, norm_layer=BatchNormAct2d)
    assert len(fuse(nn.Sequential(block))[0].fused_describe().calls) == 1
