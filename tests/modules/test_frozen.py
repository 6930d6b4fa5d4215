"""FrozenBatchNorm2d of torchvision and others: constants, whose expression may promote to float32 under autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.shared_blocks import Gated
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, functional, fuse
from resnet_fused.tools.saved_bytes import saved_bytes

misc = pytest.importorskip("torchvision.ops.misc")
tv = pytest.importorskip("torchvision.models.resnet")
layer_getter = pytest.importorskip("torchvision.models._utils")
Frozen = misc.FrozenBatchNorm2d
LAST = torch.channels_last


def settled(model: nn.Module) -> nn.Module:
    """With constants that are not those of a fresh norm."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (Frozen, Constants)):
            for name in ("weight", "running_var"):
                getattr(module, name).uniform_(0.5, 1.5, generator=generator)
            for name in ("bias", "running_mean"):
                getattr(module, name).normal_(0, 0.5, generator=generator)
    return model.to(memory_format=LAST)  # type: ignore[call-overload]


def projection(norm: Callable[[int], nn.Module] = Frozen) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), norm(16))


def mixed() -> nn.Module:
    """The chain's last norm is frozen, the projection's is not."""
    return tv.Bottleneck(8, 4, norm_layer=Frozen, downsample=projection(nn.BatchNorm2d))


def thawed_end() -> nn.Module:
    """The other way round: the sum has the dtype of the branch, to which torchvision adds in place."""
    block = tv.Bottleneck(8, 4, norm_layer=Frozen, downsample=projection())
    block.bn3 = nn.BatchNorm2d(16)
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "projection": lambda: tv.Bottleneck(8, 4, norm_layer=Frozen, downsample=projection()),
    "pooling beside the branch": lambda: tv.Bottleneck(
        8, 4, 2, nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), *projection()), norm_layer=Frozen
    ),
    "basic": lambda: tv.BasicBlock(8, 8, norm_layer=Frozen),
    "one behind another": lambda: nn.Sequential(*(tv.Bottleneck(8, 2, norm_layer=Frozen) for _ in range(3))),
    "gated": lambda: Gated(8, Frozen),
    "projection thawed": mixed,
    "end thawed": thawed_end,
}


class Constants(nn.Module):
    """The four buffers that every library's class has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))


class DetrFrozenBatchNorm2d(Constants):
    """As transformers' DETR: torchvision's expression, without an attribute for eps."""

    __module__ = "transformers.models.detr.modeling_detr"

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt())[:, None, None]
        return x * scale + (self.bias[:, None, None] - self.running_mean[:, None, None] * scale)


class FrozenBatchNorm2d(Constants):
    """As detectron2's: a batch norm in evaluation, which keeps its input's dtype."""

    __module__ = "detectron2.layers.batch_norm"
    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def pictures() -> Tensor:
    x = torch.randn(4, 8, 7, 6, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=LAST)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_trains_as_eager(block: Callable[[], nn.Module], autocast: torch.dtype | None) -> None:
    """Outputs (their dtype too), gradients and buffers; float64 exactly, otherwise no further off than twice eager."""
    torch.manual_seed(0)
    assert_trains_as_eager(settled(block()), pictures(), autocast=autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_dtype_under_autocast_is_eagers(dtype: torch.dtype, grad: bool) -> None:
    for make in BLOCKS.values():
        model = settled(make())
        fused = fuse(copy.deepcopy(model))
        x = pictures().to(dtype)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            assert fused(x).dtype == model(x).dtype


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("norm", [DetrFrozenBatchNorm2d, FrozenBatchNorm2d], ids=["transformers", "detectron2"])
def test_other_libraries_frozen_norms(norm: type[nn.Module], autocast: torch.dtype | None) -> None:
    torch.manual_seed(1)  # with 0 one sum is zero but for bfloat16's rounding, and one run's ReLU passes it
    block = settled(tv.Bottleneck(8, 4, norm_layer=norm, downsample=projection(norm)))
    assert_trains_as_eager(block, pictures(), autocast=autocast)
    (row,) = explain(fuse(block))
    assert (row.backend, row.reason) == ("native", "")


def test_skip_path_keeps_its_width() -> None:
    """Not rounded to bfloat16 on the way: with a branch of zeros it is the identity on positive values."""
    block = settled(tv.BasicBlock(8, 8, norm_layer=Frozen))
    for name in ("weight", "bias"):
        getattr(block.bn2, name).zero_()
    x = pictures().abs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fuse(block)(x), x)


def test_explain_says_what_runs() -> None:
    model = fuse(settled(BLOCKS["projection"]()))
    (row,) = explain(model)
    assert (row.backend, row.reason) == ("native", "")
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = explain(model)
    assert row.backend == "native" and "FrozenBatchNorm2d's result is float32" in row.reason


def test_eager_backend_promotes_too() -> None:
    """`reference.residual_block`, which every other path is held against."""
    model = settled(BLOCKS["projection"]())
    described = fuse(copy.deepcopy(model)).fused_describe()
    x = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        got = functional.residual_block(x, described.params, described.spec, backend="eager")
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)  # bfloat16's rounding of what convolutions read


@pytest.mark.parametrize("projects", [False, True])
def test_what_a_block_keeps_under_autocast(projects: bool) -> None:
    """One x and the convolutions' outputs but the last in bfloat16, a bit per value for the mask; no float32 sum."""
    projection = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), Frozen(16)) if projects else None
    block = fuse(settled(tv.Bottleneck(16, 4, norm_layer=Frozen, downsample=projection)))
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    pixels, weights = 2 * 6 * 6, sum(p.numel() for p in block.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: block(x), block.buffers())
    least = 2 * pixels * (16 + 4 + 4) + pixels * 16 // 8 + 2 * weights
    assert least <= kept <= least + 4 * 3 * 16  # and a vector per channel, at the most


@pytest.mark.parametrize(("autocast", "share"), [(False, 1.0), (True, 0.6)], ids=["float32", "autocast"])
def test_a_detection_backbone_keeps_less(autocast: bool, share: float) -> None:
    """torchvision's resnet50 as its detectors have it: frozen norms, and frozen weights up to layer1.

    Of 6 units of a bottleneck in float32 x is 4, and the two ReLU outputs, which eager keeps, are as large as the two
    convolution outputs that we keep: nothing to save. Under autocast eager keeps float32 results beside their bfloat16
    copies. The weights' copies in bfloat16 are no activations; both keep them.
    """
    torch.manual_seed(0)
    model = settled(tv.resnet50(norm_layer=Frozen, num_classes=4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    cast = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad)
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=LAST)
    body = layer_getter.IntermediateLayerGetter(model, {f"layer{i}": f"{i}" for i in (1, 2, 3, 4)})

    def activations(network: nn.Module) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = saved_bytes(partial(network, x), network.buffers())
        return kept - cast if autocast else kept

    eager = activations(body)
    got = activations(fuse(body))
    assert 0 < got <= share * eager
