"""The blocks of mmdet, mmseg and mmpretrain, by stand-ins."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from support.stand_ins import conv, copy_of, pictures, pooled_projection, projection, settled, stands_for
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse
from resnet_fused.modules.fuse import why_not

BACKBONES = "mmpretrain.models.backbones"


@stands_for("mmcv.cnn.bricks.wrappers.Conv2d")
class Conv2d(nn.Conv2d):
    pass


@stands_for("mmengine.model.utils._BatchNormXd")
class BatchNormXd(nn.modules.batchnorm._BatchNorm):
    """What mmengine's revert_sync_batchnorm puts in place of a SyncBatchNorm."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


@stands_for("mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm")
class SyncBatchNorm(nn.SyncBatchNorm):
    pass


@stands_for("mmcv.cnn.bricks.drop.DropPath")
class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (keep + torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype)).floor()


@stands_for("mmcv.cnn.bricks.swish.Swish")
class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@stands_for("mmcv.cnn.bricks.conv_module.ConvModule")
class ConvModule(nn.Module):
    def __init__(self, layer: nn.Conv2d, act: nn.Module | None, norm: bool = True) -> None:
        super().__init__()
        self.order, self.with_explicit_padding = ("conv", "norm", "act"), False
        self.with_norm, self.with_activation = norm, act is not None
        self.conv = layer
        if norm:
            self.bn = nn.BatchNorm2d(layer.out_channels)
        if act is not None:
            self.activate = act

    @property
    def norm(self) -> nn.Module:
        return self.bn

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        x = self.conv(x)
        if norm and self.with_norm:
            x = self.norm(x)
        return self.activate(x) if activate and self.with_activation else x


@stands_for("mmpretrain.models.utils.se_layer.SELayer")
class SELayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.return_weight = False
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = ConvModule(nn.Conv2d(channels, 4, 1), nn.ReLU(), norm=False)
        self.conv2 = ConvModule(nn.Conv2d(4, channels, 1), nn.Sigmoid(), norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(self.global_avgpool(x)))


class Block(nn.Module):
    """OpenMMLab's: norms under names that attributes tell, activation checkpointing, stochastic depth."""

    def __init__(
        self,
        convs: list[nn.Module],
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        downsample: nn.Module | None = None,
        drop_path: float = 0.0,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for i, layer in enumerate(convs, start=1):
            setattr(self, f"conv{i}", layer)
            setattr(self, f"norm{i}_name", f"bn{i}")
            setattr(self, f"bn{i}", norm(layer.out_channels))
        self.count, self.with_cp, self.with_plugins = len(convs), False, False
        self.relu = nn.ReLU(inplace=True) if act is None else act
        self.downsample = downsample
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    norm1 = property(lambda self: getattr(self, self.norm1_name))
    norm2 = property(lambda self: getattr(self, self.norm2_name))
    norm3 = property(lambda self: getattr(self, self.norm3_name))

    def branch(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.count + 1):
            out = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(self.relu(out) if i > 1 else out))
        return self.drop_path(out)

    def inner(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x if self.downsample is None else self.downsample(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return self.relu(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))
        return self.relu(self.inner(x))


@stands_for(f"{BACKBONES}.seresnet.SEBottleneck")
class SEBottleneck(Block):
    """It has a `drop_path` and leaves it out."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.se_layer = SELayer(self.conv3.out_channels)

    def branch(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.se_layer(self.norm3(self.conv3(self.relu(out))))


class Darknet(nn.Module):
    def __init__(self, act: nn.Module, add_identity: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvModule(conv(8, 4, 1), act), ConvModule(conv(4, 8, 3), act)
        self.add_identity = add_identity

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        return out + x if self.add_identity else out


BasicBlock = copy_of(Block, f"{BACKBONES}.resnet.BasicBlock")
Bottleneck = copy_of(Block, "mmdet.models.backbones.resnet.Bottleneck")
ResNeXtBottleneck = copy_of(Block, "mmseg.models.backbones.resnext.Bottleneck")
DarknetBottleneck = copy_of(Darknet, "mmdet.models.layers.csp_layer.DarknetBottleneck")


def basic(channels: int = 8, out: int = 8, stride: int = 1, **arguments: object) -> nn.Module:
    return BasicBlock([conv(channels, out, 3, stride), conv(out, out, 3)], **arguments)


def bottleneck(cls: type[nn.Module], **arguments: object) -> nn.Module:
    return cls([conv(8, 4, 1), conv(4, 4, 3), conv(4, 8, 1)], **arguments)


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "ResNet": lambda: [
        basic(),
        basic(8, 12, 2, downsample=projection(8, 12, 2)),
        # the stride of style "caffe", in the 1x1 convolution
        Bottleneck([conv(12, 4, 1, 2), conv(4, 4, 3, dilation=2), conv(4, 16, 1)], downsample=projection(12, 16, 2)),
        ResNeXtBottleneck([conv(16, 8, 1), conv(8, 8, 3, groups=2), conv(8, 16, 1)]),
    ],
    "ResNet v1d": lambda: [
        basic(8, 12, 2, downsample=pooled_projection(8, 12, 2), act=nn.SiLU()),
        Bottleneck([conv(12, 4, 1), conv(4, 4, 3, 2), conv(4, 16, 1)], downsample=pooled_projection(12, 16, 2)),
    ],
    "mmcv's convolution, mmengine's norm": lambda: [
        BasicBlock([Conv2d(8, 8, 3, padding=1, bias=False), Conv2d(8, 8, 3, padding=1, bias=False)], norm=BatchNormXd),
        Bottleneck([conv(8, 4, 1), Conv2d(4, 4, 3, padding=1, bias=False), conv(4, 8, 1)], norm=BatchNormXd),
    ],
    "stochastic depth": lambda: [basic(drop_path=0.5), bottleneck(Bottleneck, drop_path=0.3)],
    "squeeze-excitation": lambda: [bottleneck(SEBottleneck), bottleneck(SEBottleneck)],
    "Darknet": lambda: [
        DarknetBottleneck(nn.LeakyReLU(0.1)),
        DarknetBottleneck(Swish()),
        DarknetBottleneck(nn.SiLU(), add_identity=False),
    ],
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settled(nn.Sequential(*MODELS[name]()))


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_eager(name: str) -> None:
    model = model_of(name)
    assert_trains_as_eager(model, pictures())
    rows = explain(fuse(model))
    assert len(rows) == len(model)
    assert {row.backend for row in rows} == {"native"}


def test_synchronised_norms_are_pytorchs() -> None:
    """Alone, or in evaluation, it is a batch norm; PyTorch's own takes no CPU tensors in training."""
    block = settled(BasicBlock([conv(8, 8, 3), conv(8, 8, 3)], norm=SyncBatchNorm)).eval()
    fused = fuse(copy.deepcopy(block))
    with torch.no_grad():
        torch.testing.assert_close(fused(pictures()), block(pictures()))
    (row,) = explain(fused)
    assert row.backend == "native"
    assert fused.train().fused_describe().params.stages[0].processes is not None


def test_activation_checkpointing_is_the_blocks_own() -> None:
    """A checkpointed branch runs once more in backward, and so do its children's hooks."""
    fused, calls = fuse(settled(basic())), []
    fused.with_cp = True
    fused.conv1.register_forward_hook(lambda *_: calls.append(1))
    (row,) = explain(fused)
    assert "with_cp is set" in row.reason and row.backend == "eager"
    fused(pictures().requires_grad_()).sum().backward()
    assert len(calls) == 2
    fused.conv1._forward_hooks.clear()
    (row,) = explain(fused.eval())
    assert row.backend == "native"


def with_plugins(block: nn.Module) -> None:
    block.with_plugins = True


def with_another_drop_path(block: nn.Module) -> None:
    block.drop_path = nn.Dropout()


def with_group_norm(block: nn.Module) -> None:
    block.bn2 = nn.GroupNorm(2, 8)


REFUSED = {
    "plugins": (with_plugins, "with_plugins is set"),
    "drop path": (with_another_drop_path, "drop_path is Dropout"),
    "norm": (with_group_norm, "stages[1].norm is GroupNorm"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_parts_without_a_fused_form_are_named(change: Callable[[nn.Module], None], reason: str) -> None:
    block = basic()
    change(block)
    assert reason in str(why_not(block))


def test_layers_within_a_block() -> None:
    block = DarknetBottleneck(nn.ReLU())
    block.conv1.order = ("act", "conv", "norm")
    assert "conv1 has order=('act', 'conv', 'norm')" in str(why_not(block))
    block = DarknetBottleneck(nn.ReLU())
    block.conv2 = nn.Sequential(block.conv2)
    assert "conv2 is Sequential; accepted: ConvModule" in str(why_not(block))


def test_a_layer_on_its_own_keeps_its_arguments() -> None:
    layer = fuse(nn.Sequential(basic(), ConvModule(conv(8, 8, 1), nn.ReLU())))[1]
    assert (layer(pictures(), activate=False) < 0).any()
    assert "arguments beside its input" in str(why_not(layer))


@stands_for("mmdet.models.backbones.resnet.ResNetV1d")
class ResNetV1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = (conv(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()), (conv(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.stem, self.layer1 = nn.Sequential(*first, *second), basic()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(self.stem(x))


def test_a_deep_stem_is_one_chain() -> None:
    torch.manual_seed(0)
    model = settled(ResNetV1d())
    assert_trains_as_eager(model, pictures(3, 17))
    assert [(row.name, row.backend) for row in explain(fuse(model))] == [("stem", "native"), ("layer1", "native")]
    assert len(model.stem.fused_describe().spec.stages) == 2
