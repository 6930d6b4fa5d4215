"""Blocks of several fused calls: real classes of timm and torchvision, which train as eager and have no eager pair."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.library_blocks import made
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.plan import Described, Plan
from resnet_fused.tools.coverage import pairs, unfused
from resnet_fused.tools.verification import verify

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
resnet = pytest.importorskip("timm.models.resnet")
regnet = pytest.importorskip("timm.models.regnet")
resnetv2 = pytest.importorskip("timm.models.resnetv2")
senet = pytest.importorskip("timm.models.senet")
sknet = pytest.importorskip("timm.models.sknet")
byobnet = pytest.importorskip("timm.models.byobnet")
from timm.layers import BatchNormAct2d, BlurPool2d, ConvNormAct, DropBlock2d  # noqa: E402
from torchvision.models import regnet as tv_regnet  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.segmentation import deeplabv3, fcn  # noqa: E402

NORM = {"norm_layer": BatchNormAct2d}
PLAIN = {"conv_layer": timm.layers.create_conv2d, "norm_layer": BatchNormAct2d}


def down(channels: int, out: int, stride: int = 2) -> nn.Module:
    return resnet.downsample_avg(channels, out, 1, stride)


def regnet_y(cls: type[nn.Module] = regnet.Bottleneck, **arguments: Any) -> nn.Module:
    return cls(8, 16, **{"stride": 2, "bottle_ratio": 1, "group_size": 4, "se_ratio": 0.5} | arguments)


def preactivated(cls: type[nn.Module] = resnetv2.PreActBottleneck, **arguments: Any) -> nn.Module:
    return cls(8, 16, **{"stride": 2, "proj_layer": resnetv2.DownsampleAvg} | PLAIN | arguments)


def torchvision_block(width_in: int, stride: int, se_ratio: float | None) -> nn.Module:
    return tv_regnet.ResBottleneckBlock(width_in, 16, stride, nn.BatchNorm2d, nn.ReLU, 4, 1.0, se_ratio)


def legacy(cls: type[nn.Module], projects: bool) -> nn.Module:
    downsample = nn.Sequential(nn.Conv2d(8, 4 * cls.expansion, 1, 2, bias=False), nn.BatchNorm2d(4 * cls.expansion))
    return cls(8, 4, 1, 2, 2, downsample) if projects else cls(8, 8 // cls.expansion, 1, 2)


# name: (what makes it, how many fused calls; 1: no plan)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "average pooling before the projection": (lambda: resnet.Bottleneck(8, 4, 2, down(8, 16)), 2),
    "average pooling, basic block": (lambda: resnet.BasicBlock(8, 16, 2, down(8, 16)), 2),
    "anti-aliasing": (lambda: resnet.Bottleneck(8, 4, 2, down(8, 16), aa_layer=BlurPool2d), 3),
    "anti-aliasing, basic block": (lambda: resnet.BasicBlock(8, 16, 2, down(8, 16), aa_layer=nn.AvgPool2d), 3),
    "anti-aliasing and attention": (
        lambda: resnet.Bottleneck(8, 4, 2, down(8, 16), aa_layer=BlurPool2d, attn_layer=timm.layers.SEModule),
        3,
    ),
    "dropped regions": (lambda: resnet.Bottleneck(16, 4, drop_block=lambda: DropBlock2d(0.2, 3, batchwise=True)), 2),
    "RegNet X": (lambda: regnet_y(se_ratio=0), 1),
    "RegNet Y": (regnet_y, 3),
    "RegNet Y, identity": (lambda: regnet.Bottleneck(16, 16, group_size=4, drop_path_rate=0.5), 2),
    "RegNet Y, average pooling": (lambda: regnet_y(downsample="avg", act_layer="silu"), 3),
    "RegNet Z: no skip path": (lambda: regnet_y(downsample=None, linear_out=True, act_layer="silu"), 2),
    "RegNet V": (lambda: regnet_y(regnet.PreBottleneck, downsample="avg", act_layer="silu"), 3),
    "RegNet V, identity": (lambda: regnet.PreBottleneck(16, 16, group_size=4, act_layer=nn.SiLU), 2),
    "RegNet V without attention": (lambda: regnet_y(regnet.PreBottleneck, se_ratio=0), 2),
    "ResNet v2": (lambda: preactivated(proj_layer=resnetv2.DownsampleConv), 1),
    "ResNet v2, average pooling": (preactivated, 2),
    "ResNet v2, basic": (lambda: preactivated(resnetv2.PreActBasic), 2),
    "ResNet v2, identity": (lambda: resnetv2.PreActBottleneck(16, drop_path_rate=0.5, **PLAIN), 1),
    "ResNet v2, stochastic depth": (
        lambda: preactivated(proj_layer=resnetv2.DownsampleConv, drop_path_rate=0.5),
        2,
    ),
    "SE-ResNet": (lambda: legacy(senet.SEResNetBottleneck, True), 1),
    "SE-ResNet, basic block": (lambda: legacy(senet.SEResNetBlock, True), 2),
    "SE-ResNet, basic block, identity": (lambda: legacy(senet.SEResNetBlock, False), 1),
    "torchvision's RegNet X": (lambda: torchvision_block(8, 2, None), 1),
    "torchvision's RegNet Y": (lambda: torchvision_block(8, 2, 0.5), 3),
    "torchvision's RegNet Y, identity": (lambda: torchvision_block(16, 1, 0.5), 2),
    "timm's layer": (lambda: ConvNormAct(8, 16, 3, stride=2), 1),
    "timm's layer, anti-aliased": (lambda: ConvNormAct(8, 16, 3, stride=2, aa_layer=BlurPool2d), 1),
    "torchvision's layer": (lambda: torchvision.ops.Conv2dNormActivation(8, 16), 1),
    "timm's configurable bottleneck": (lambda: byob("eca", "avg"), 3),
    "timm's configurable bottleneck, attention at its end": (lambda: byob("se", "", attn_last=True), 1),
    "selective kernels": (lambda: sknet.SelectiveKernelBottleneck(8, 4, 2, down(8, 16)), 3),
    "selective kernels, basic block": (lambda: sknet.SelectiveKernelBasic(16, 16, sk_kwargs={"split_input": False}), 1),
    "a depthwise layer of many taps": (
        lambda: torchvision.ops.Conv2dNormActivation(8, 8, 5, groups=8, activation_layer=nn.Hardswish),
        1,
    ),
    "a segmentation head": (lambda: fcn.FCNHead(8, 5), 1),
    "an atrous convolution": (lambda: deeplabv3.ASPPConv(8, 16, 2), 1),
}


def byob(attention: str, downsample: str, **arguments: Any) -> nn.Module:
    layers = byobnet.LayerFn(attn=functools.partial(timm.layers.create_attn, attention))
    return byobnet.BottleneckBlock(8, 16, stride=2, downsample=downsample, layers=layers, **arguments)


def given(model: nn.Module, n: int = 4, size: int = 10) -> Tensor:
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    if isinstance(model[0], (resnetv2.PreActBottleneck, regnet.PreBottleneck)):  # whose projection comes first
        channels = model[0].norm1.num_features
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_pair_is_fused_and_trains_as_eager(name: str) -> None:
    make, calls = BLOCKS[name]
    model = made(make)
    x = given(model)
    assert_trains_as_eager(model, x)
    convs = pairs(copy.deepcopy(model).eval(), x)
    fuse(model)
    assert convs and not unfused(model, convs)
    described = next(m for m in model.modules() if isinstance(m, FusedModule)).fused_describe()
    assert len(described.calls) == calls
    assert {row.backend for row in explain(model)} == {"native"}
    if isinstance(described, Plan):
        count = "one fused call" if calls == 1 else f"{calls} fused calls"
        assert f"{count} beside PyTorch's own modules" in explain(model)[0].reason


AUTOCAST = ["anti-aliasing", "RegNet Y, average pooling", "ResNet v2, average pooling", "SE-ResNet, basic block"]


@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast(name: str) -> None:
    model = made(BLOCKS[name][0])
    assert_trains_as_eager(model, given(model), autocast=torch.bfloat16)


def backbone() -> nn.Module:
    model = torchvision.models.resnet18()
    return IntermediateLayerGetter(model, {"layer1": "fine", "layer2": "coarse"})


STEMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "SENet": (
        lambda: senet.SENet(senet.SEResNetBlock, (1, 1, 1, 1), 1, 16, input_3x3=True, num_classes=5, drop_rate=0),
        "layer0",
    ),
    "ResNet v2": (
        lambda: resnetv2.ResNetV2((1, 1), (32, 64), num_classes=5, stem_chs=16, stem_type="deep", **PLAIN),
        "stem",
    ),
    "torchvision's backbone": (backbone, ""),
    "DeepLab's head": (lambda: deeplabv3.DeepLabHead(3, 5, (2, 3)), "0.project"),
    "torchvision's RegNet": (lambda: torchvision.models.regnet_y_400mf(), "stem"),
}


@pytest.mark.parametrize("name", STEMS)
def test_stems_and_heads_in_their_models(name: str) -> None:
    """Forward alone, in both modes; in float64, where only the order of sums differs.

    The pictures are large enough for the last norms to have eight values per channel: with two, which may lie close
    together, rounding of 1e-16 becomes 1e-5 in eager, too.
    """
    make, stem = STEMS[name]
    eager = made(make)[0].double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fused = fuse(copy.deepcopy(eager))
    assert isinstance(fused.get_submodule(stem), FusedModule)
    left = unfused(fused, pairs(copy.deepcopy(eager).eval(), x))
    assert not left
    with torch.no_grad():
        for training in (True, False):
            expected, got = eager.train(training)(x), fused.train(training)(x)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-9, atol=1e-9)


def test_a_backbone_that_returns_its_stem_runs_its_own_forward() -> None:
    model = IntermediateLayerGetter(torchvision.models.resnet18(), {"relu": "stem", "layer1": "fine"}).eval()
    x, seen = torch.randn(1, 3, 32, 32), []
    fuse(model)
    model.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    assert list(model(x)) == ["stem", "fine"] and seen == ["bn1"]


def test_frozen_norms_with_activation() -> None:
    model = timm.layers.freeze_batch_norm_2d(made(BLOCKS["RegNet Y"][0]))
    assert "FrozenBatchNormAct2d" in repr(model)
    assert_trains_as_eager(model, given(model))
    assert {row.backend for row in explain(fuse(model))} == {"native"}


class TestHooksAndChanges:
    def model(self) -> nn.Module:
        return made(BLOCKS["RegNet Y, average pooling"][0]).eval()

    def test_a_hook_on_a_part_makes_the_block_run_its_own_forward(self) -> None:
        model, seen = fuse(self.model()), []
        x = given(model)
        with torch.no_grad():
            expected = model(x)
            handle = model[0].conv2.register_forward_hook(lambda *_: seen.append("conv2"))
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)  # rounding of another order
        assert seen == ["conv2"]
        assert "has hooks" in explain(model)[0].reason
        handle.remove()

    def test_a_hook_on_what_is_called_runs_in_the_fused_block(self) -> None:
        model, seen = fuse(self.model()), []
        pool = model[0].downsample[0]
        pool.register_forward_hook(lambda *_: seen.append("pool"))
        with torch.no_grad():
            model(given(model))
        assert seen == ["pool"] and explain(model)[0].backend == "native"

    def test_described_once_and_again_after_a_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, seen = fuse(self.model()), []
        original = FusedModule.fused_describe
        monkeypatch.setattr(FusedModule, "fused_describe", lambda self: [seen.append(1), original(self)][1])
        x = given(model)
        with torch.no_grad():
            model(x), model(x)
            assert len(seen) == 1
            kept = [call.params.kept for call in model[0]._fused_description.block.calls]
            model[0].downsample[0] = nn.MaxPool2d(2, 2)
            got = model(x)
            torch.testing.assert_close(got, unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)
        assert len(seen) == 2
        assert [call.params.kept for call in model[0]._fused_description.block.calls] == kept

    def test_copies_pickles_and_unfusing(self) -> None:
        model = self.model()
        x, names = given(model), list(model.state_dict())
        with torch.no_grad():
            expected = model(x)
            fused = pickle.loads(pickle.dumps(fuse(model)))
            assert isinstance(fused[0].fused_describe(), Plan) and list(fused.state_dict()) == names
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
            assert type(unfuse(fused)[0]) is regnet.Bottleneck
            assert torch.equal(fused(x), expected)


def test_verify_compares_composite_blocks() -> None:
    model = nn.Sequential(made(BLOCKS["RegNet Y"][0])[0], regnet.Bottleneck(16, 16, group_size=4)).eval()
    report = verify(model, torch.randn(2, 8, 12, 12), seeds=1, min_fused=1.0)
    assert report.ok
    assert "2 of 2 blocks run fused" in report.table()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "standardised convolutions": (
        lambda: preactivated(conv_layer=timm.layers.StdConv2d),
        "stages[0].conv is StdConv2d",
    ),
    "another norm, in the stem as well": (
        lambda: resnet.ResNet(resnet.BasicBlock, (1, 1), channels=(32, 64), norm_layer="groupnorm", stem_type="deep"),
        "stages[0].norm is GroupNorm",
    ),
    "group norm": (
        lambda: resnetv2.PreActBottleneck(32, bottle_ratio=1, conv_layer=timm.layers.create_conv2d),
        "is GroupNormAct",
    ),
    "a norm that drops": (lambda: regnet_y(drop_block=lambda: DropBlock2d(0.2)), "norm drops with DropBlock2d"),
    "a layer without norm": (lambda: ConvNormAct(8, 8, apply_norm=False), "it has no norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_fused_form_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    model = nn.Sequential(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where nothing at all is fused
        fuse(model)
    assert reason in explain(model)[0].reason


def test_what_a_fused_block_calls_is_shown() -> None:
    rows = explain(fuse(made(BLOCKS["selective kernels"][0])))
    attention = [row for row in rows if row.block == "SelectiveKernelAttn"]
    assert [(row.name, row.backend) for row in attention] == [("0.conv2.attn", "native")]
    assert [row.name for row in rows if row.block == "ConvNormAct"] == ["0.conv2.paths.0", "0.conv2.paths.1"]


def test_pieces_of_a_block_that_is_left_alone_are_fused() -> None:
    model = fuse(nn.Sequential(regnet_y(drop_block=lambda: DropBlock2d(0.2))))
    rows = {row.name: row for row in explain(model)}
    assert rows["0"].backend == "eager" and rows["0.conv1"].backend == "native"
    assert isinstance(model[0].conv1, FusedModule) and not isinstance(model[0], FusedModule)
    assert not isinstance(model[0].conv3, FusedModule)  # a layer on its own without an activation
    described = model[0].conv1.fused_describe()
    assert isinstance(described, Described)


@pytest.mark.parametrize("changes", [{"activation_layer": nn.ReLU6}, {"groups": 8}, {"activation_layer": None}])
def test_a_layer_that_pytorch_runs_faster_is_left_alone(changes: dict[str, Any]) -> None:
    (row,) = explain(fuse(nn.Sequential(torchvision.ops.Conv2dNormActivation(8, 16, **changes))))
    assert row.backend == "eager" and "a layer on its own is faster in PyTorch" in row.reason
