"""timm's and torchvision's families beyond ResNet and RegNet: blocks train as eager, and what is left is named."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.library_blocks import made
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.block_modules import CompositeModules, SplitModules
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.testing import assert_equivalent
from resnet_fused.tools.coverage import fuse_quietly, pairs, unfused

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
byobnet = pytest.importorskip("timm.models.byobnet")
cspnet = pytest.importorskip("timm.models.cspnet")
densenet = pytest.importorskip("timm.models.densenet")
dla = pytest.importorskip("timm.models.dla")
res2net = pytest.importorskip("timm.models.res2net")
resnest = pytest.importorskip("timm.models.resnest")
resnet = pytest.importorskip("timm.models.resnet")
selecsls = pytest.importorskip("timm.models.selecsls")
googlenet = pytest.importorskip("torchvision.models.googlenet")
from timm.layers import BlurPool2d, ConvNormAct  # noqa: E402
from timm.layers.bottleneck_attn import BottleneckAttn  # noqa: E402
from timm.layers.cbam import CbamModule  # noqa: E402
from torchvision.models import densenet as tv_densenet  # noqa: E402
from torchvision.models import vgg  # noqa: E402
from torchvision.models.segmentation import deeplabv3  # noqa: E402
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402

ALONE = "a layer on its own is faster in PyTorch"
SIZE = 10


def byob(cls: type[nn.Module], channels: int, attention: str = "", blur: bool = False, **arguments: Any) -> nn.Module:
    conv = functools.partial(ConvNormAct, aa_layer=BlurPool2d) if blur else ConvNormAct
    attn = functools.partial(timm.layers.create_attn, attention) if attention else None
    block = cls(channels, 16, layers=byobnet.LayerFn(conv_norm_act=conv, attn=attn), **arguments)
    for module in block.modules():
        if hasattr(module, "conv_attn"):
            module.conv_attn.bias.requires_grad_(False)  # no gradient but rounding: a softmax follows
    return block


def attending(**arguments: Any) -> nn.Module:
    attention = functools.partial(BottleneckAttn, feat_size=(SIZE, SIZE), num_heads=2, dim_head=4)
    return byobnet.SelfAttnBlock(8, 16, layers=byobnet.LayerFn(self_attn=attention), **arguments)


def csp(cls: type[nn.Module], act: type[nn.Module] = nn.ReLU, **arguments: Any) -> nn.Module:
    return cls(8, 16, 2, 1, depth=1, block_ratio=0.5, act_layer=act, norm_layer=nn.BatchNorm2d, **arguments)


def down(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))


def res2net_block(channels: int = 32, **arguments: Any) -> nn.Module:
    return res2net.Bottle2neck(channels, 8, base_width=32, scale=3, norm_layer=nn.BatchNorm2d, **arguments)


def split_attention(radix: int, **arguments: Any) -> nn.Module:
    block = resnest.ResNestBottleneck(32, 8, radix=radix, norm_layer=nn.BatchNorm2d, **arguments)
    if radix:
        block.conv2.fc1.bias.requires_grad_(False)  # no gradient but rounding: a norm follows
    return block


# name: (what makes it, how many fused calls, which convolutions before a norm are left, by the end of their name)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "GENet's basic block": (lambda: byob(byobnet.BasicBlock, 8, stride=2), 2, set()),
    "basic block, stochastic depth": (lambda: byob(byobnet.BasicBlock, 16, drop_path_rate=0.5), 1, set()),
    "dark block with attention": (lambda: byob(byobnet.DarkBlock, 8, "se", attn_last=False, stride=2), 3, set()),
    "edge block": (lambda: byob(byobnet.EdgeBlock, 8, "se", stride=2), 3, set()),
    "edge block without a shortcut": (lambda: byob(byobnet.EdgeBlock, 8, downsample=""), 1, set()),
    "CLIP's blur behind the second convolution": (
        lambda: byob(byobnet.BottleneckBlock, 8, blur=True, stride=2),
        3,
        set(),
    ),
    "a blur and attention": (lambda: byob(byobnet.BottleneckBlock, 8, "se", blur=True, stride=2), 3, set()),
    "attention over places": (lambda: byob(byobnet.BottleneckBlock, 16, "gc"), 2, set()),
    "attention over places, last": (
        lambda: byob(byobnet.BottleneckBlock, 16, "gc", attn_last=True, drop_path_rate=0.5),
        1,
        set(),
    ),
    "attention over places, no shortcut": (
        lambda: byob(byobnet.BottleneckBlock, 8, "gc", attn_last=True, downsample=""),
        1,
        set(),
    ),
    "self-attention": (attending, 3, set()),
    "CBAM": (lambda: resnet.Bottleneck(16, 4, attn_layer=CbamModule), 1, {"se.spatial.conv.conv"}),
    "RepVGG, two branches": (lambda: byob(byobnet.RepVggBlock, 8, stride=2), 1, set()),
    "RepVGG, three branches": (lambda: byob(byobnet.RepVggBlock, 16), 2, set()),
    "RepVGG, stochastic depth": (lambda: byob(byobnet.RepVggBlock, 16, drop_path_rate=0.5), 1, set()),
    "RepVGG, attention": (lambda: byob(byobnet.RepVggBlock, 16, "se"), 2, set()),
    "RepVGG, two branches and attention": (lambda: byob(byobnet.RepVggBlock, 8, "se", stride=2), 2, set()),
    "MobileOne": (lambda: byob(byobnet.MobileOneBlock, 16, num_conv_branches=2), 3, set()),
    "MobileOne, pointwise": (lambda: byob(byobnet.MobileOneBlock, 16, kernel_size=1), 1, set()),
    "cross stage's bottleneck": (lambda: cspnet.BottleneckBlock(16, 16, attn_layer=timm.layers.SEModule), 2, set()),
    "DarkNet's block": (lambda: cspnet.DarkBlock(16, 16, drop_path=0.5, act_layer=nn.SiLU), 1, set()),
    "edge block, activated before the addition": (lambda: cspnet.EdgeBlock(16, 16, act_layer=nn.LeakyReLU), 1, set()),
    "cross stage": (lambda: csp(cspnet.CrossStage), 3, set()),
    "cross stage of another activation": (
        lambda: csp(cspnet.CrossStage, nn.LeakyReLU),
        1,
        {"conv_transition_b.conv", "conv_transition.conv"},
    ),
    "cross stage, pooled": (lambda: csp(cspnet.CrossStage3, avg_down=True, down_growth=True), 2, set()),
    "cross stage, blurred": (lambda: csp(cspnet.CrossStage3, aa_layer=BlurPool2d), 3, set()),
    "Res2Net, a cascade": (res2net_block, 4, set()),
    "Res2Net, first of a stage": (lambda: res2net_block(8, stride=2, downsample=down(8, 32)), 5, set()),
    "Res2NeXt": (lambda: res2net_block(cardinality=2), 2, {"convs.0", "convs.1"}),
    "ResNeSt": (lambda: split_attention(2), 2, {"conv2.fc1"}),
    "ResNeSt, first of a stage": (
        lambda: split_attention(2, stride=2, avd=True, is_first=True, downsample=down(32, 32)),
        3,
        {"conv2.fc1"},
    ),
    "ResNeSt, one share": (lambda: split_attention(1), 2, {"conv2.fc1"}),
    "ResNeSt, pooled first": (lambda: split_attention(1, avd=True, avd_first=True, is_first=True), 3, {"conv2.fc1"}),
    "ResNeSt without shares": (lambda: split_attention(0), 1, set()),
    "DLA's basic block": (lambda: dla.DlaBasic(16, 16), 1, set()),
    "DLA's bottleneck": (lambda: dla.DlaBottleneck(16, 16), 1, set()),
    "timm's dense block": (lambda: densenet.DenseBlock(2, 8, bn_size=2, growth_rate=4), 2, set()),
    "torchvision's dense block": (lambda: tv_densenet._DenseBlock(2, 8, 2, 4, 0.0), 2, set()),
    "an atrous pyramid's pooling": (lambda: deeplabv3.ASPPPooling(8, 16), 1, set()),
}


def given(model: nn.Module, n: int = 4) -> Tensor:
    first = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)))
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
    return torch.randn(n, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BLOCKS)
def test_trains_as_eager(name: str) -> None:
    make, calls, expected = BLOCKS[name]
    model = made(make)
    x = given(model)
    assert_trains_as_eager(model, x)
    convs = pairs(copy.deepcopy(model).eval(), x)
    fuse(model)
    left = unfused(model, convs)
    assert {conv.removeprefix("0.") for conv in left} == expected and len(convs) > len(left)
    assert len(model[0].fused_describe().calls) == calls
    assert explain(model)[0].backend == "native"


AUTOCAST = ["CBAM", "RepVGG, three branches", "RepVGG, stochastic depth", "cross stage", "ResNeSt"]


@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast(name: str) -> None:
    model = made(BLOCKS[name][0])
    assert_trains_as_eager(model, given(model), autocast=torch.bfloat16)


@pytest.mark.parametrize("name", ["Res2Net, a cascade", "RepVGG, three branches", "timm's dense block"])
def test_what_is_known_of_nested_calls_outlasts_a_change(name: str) -> None:
    model = fuse(made(BLOCKS[name][0]).eval())
    x = given(model)

    def known() -> list[object]:
        with torch.no_grad():
            model(x)
        return [call.params.kept for call in model[0]._fused_description.block.calls]

    before = known()
    described = model[0]._fused_description.block
    model[0].note = "another attribute"
    after = known()
    assert model[0]._fused_description.block is not described
    assert len(before) == BLOCKS[name][1] and all(a is b for a, b in zip(before, after, strict=True))


class First(nn.Module):
    """The first of what a block returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


def small_vgg() -> nn.Module:
    """Without the large classifier."""
    features = vgg.make_layers([8, "M", 8, 8], batch_norm=True)
    for module in features:
        if isinstance(module, nn.Conv2d):
            module.bias = None  # which has no gradient but rounding: a norm follows
    with torch.device("meta"):
        model = vgg.VGG(features, num_classes=5, init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
    return model


def tree(block: type[nn.Module], **arguments: Any) -> nn.Module:
    return dla.DlaTree(1, block, 16, 32, stride=2, cardinality=1, base_width=28, level_root=True, **arguments)


# whose parts are fused: (what makes it, fused parts, convolutions that are left)
PARTS: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "DLA's tree": (lambda: tree(dla.DlaBasic), {"tree1", "tree2", "root"}, {"project.0"}),
    "DLA's tree, root with a shortcut": (
        lambda: tree(dla.DlaBottle2neck, root_shortcut=True),
        {"tree1", "tree2", "root"},
        {"project.0"},
    ),
    "GoogLeNet's Inception": (
        lambda: googlenet.Inception(8, 4, 4, 4, 4, 4, 4),
        {"branch1", "branch2", "branch3", "branch4"},
        set(),
    ),
    "SelecSLS": (
        lambda: First(selecsls.SelecSlsBlock(8, 8, 8, 8, True, 2)),
        {"block", "block.conv1", "block.conv6"},
        set(),
    ),
    "VGG": (small_vgg, {"features"}, set()),
    "a stem of layers in a row": (
        lambda: cspnet.CspNet(
            cspnet.CspModelCfg(
                stem=cspnet.CspStemCfg(out_chs=(8, 8), stride=4, pool="max"),
                stages=cspnet.CspStagesCfg(
                    depth=(1,), out_chs=(16,), stride=(2,), stage_type="dark", block_type="dark"
                ),
                act_layer="leaky_relu",
            ),
            num_classes=5,
        ),
        {"stem", "stages.0.blocks.0"},
        {"stages.0.conv_down.conv"},
    ),
    "a configurable stem": (
        lambda: nn.Sequential(byobnet.Stem(8, (8, 8), layers=byobnet.LayerFn(act=nn.SiLU))),
        {"0"},
        set(),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_left_alone_holds_fused_parts(name: str) -> None:
    make, parts, expected = PARTS[name]
    model = made(make)[0]
    x = torch.randn(4, 16 if "tree" in name else 8 if "stem of" not in name and name != "VGG" else 3, 16, 16)
    assert_trains_as_eager(model, x)
    convs = pairs(copy.deepcopy(model).eval(), x)
    fuse_quietly(model)
    assert set(unfused(model, convs)) == expected
    assert {part for part, module in model.named_modules() if isinstance(module, FusedModule)} == parts


def test_a_model_of_trees_is_equivalent() -> None:
    """verify hands each block what the model hands it: a shortcut, or a list of maps."""
    torch.manual_seed(0)
    model = dla.DLA((1, 1, 1, 1, 1, 1), (8, 8, 8, 16, 16, 16), num_classes=5, block=dla.DlaBasic)
    assert_equivalent(model, torch.randn(4, 3, 64, 64), seeds=1, min_fused=1.0)


def test_a_model_of_cascades_is_equivalent() -> None:
    torch.manual_seed(0)
    arguments = {"block_args": {"scale": 4}, "base_width": 32, "zero_init_last": False}
    model = resnet.ResNet(res2net.Bottle2neck, (2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5, **arguments)
    assert_equivalent(model, torch.randn(4, 3, 32, 32), seeds=1, min_fused=1.0)


def test_dropped_features_of_a_dense_layer() -> None:
    """Of ones that nothing else changes: zero or doubled in training, kept in evaluation."""
    block = tv_densenet._DenseBlock(1, 4, 2, 64, drop_rate=0.5)
    nn.init.zeros_(block.denselayer1.conv2.weight)
    block.denselayer1.conv2.bias = nn.Parameter(torch.ones(64))
    model, x = fuse(nn.Sequential(block)), torch.randn(2, 4, 6, 6)
    assert set(model(x)[:, 4:].unique().tolist()) == {0.0, 2.0}
    with torch.no_grad():
        assert set(model.eval()(x)[:, 4:].unique().tolist()) == {1.0}


def pyramid() -> nn.Module:
    return FeaturePyramidNetwork([8, 8], 8, norm_layer=nn.BatchNorm2d)


def reparameterized() -> nn.Module:
    block = byob(byobnet.RepVggBlock, 16)
    block.reparameterize()
    return block


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layers of a feature pyramid": (pyramid, ALONE),
    "depthwise branches": (lambda: byob(byobnet.MobileOneBlock, 16, group_size=1), "its convolutions are depthwise"),
    "a reparameterized block": (reparameterized, "it is reparameterized"),
    "a checkpointed layer": (
        lambda: tv_densenet._DenseBlock(1, 8, 2, 4, 0.0, memory_efficient=True),
        "denselayer1 is checkpointed",
    ),
    "a cross stage of single layers": (
        lambda: cspnet.CrossStage(8, 16, 1, 1, 1, act_layer=nn.LeakyReLU, norm_layer=nn.BatchNorm2d),
        ALONE,
    ),
    "one share": (lambda: res2net.Bottle2neck(32, 8, scale=1, norm_layer=nn.BatchNorm2d), "it has scale 1"),
    "another split attention": (
        lambda: setattr(block := split_attention(2), "conv2", nn.Conv2d(8, 8, 3)) or block,
        "conv2 is Conv2d",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_alone_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    assert reason in explain(fuse_quietly(nn.Sequential(make())))[0].reason


def test_a_hook_on_a_layer_in_a_row_runs() -> None:
    """The layer is then called, between what is fused."""
    model, seen = fuse(byobnet.Stem(3, (8, 8, 8), layers=byobnet.LayerFn())).eval(), []
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        model.conv2.register_forward_hook(lambda *_: seen.append("conv2"))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)  # rounding of another order
    assert seen == ["conv2"] and explain(model)[0].backend == "native"


def test_a_slice_of_a_fused_sequential_is_plain() -> None:
    model = fuse(small_vgg()).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.features[:3](x), model.features[2](model.features[1](model.features[0](x))))
    assert type(model.features[:3]) is nn.Sequential and isinstance(model.features, FusedModule)


def test_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 paths; accepted: two or more"):
        SplitModules(((),))
    with pytest.raises(ValueError, match="cascade=3; accepted: 0 to 2"):
        SplitModules(((), ()), cascade=3)
    with pytest.raises(ValueError, match="a skip path needs a branch that it is added to"):
        CompositeModules(skip=())
