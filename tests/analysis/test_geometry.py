"""Stride, field and alignment: against the pixels that a unit's gradient reaches, and numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused.analysis import geometry as geo
from resnet_fused.models import BasicBlock, ResNet
from resnet_fused.tools import named_models


def reached(model: nn.Module, layer: str, size: int, unit: int) -> tuple[int, int]:
    """First and last row that the gradient of one unit of the layer reaches; weights are positive, so none cancel."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().add_(0.01)
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, given, output: seen.append(output))
    x = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(seen[0][:, :, unit, unit].sum(), x)
    rows = gradient.sum((0, 1, 3)).nonzero().flatten()
    return int(rows[0]), int(rows[-1])


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


CHAINS = {
    "7x7 stride 2, pooling": (chain(nn.Conv2d(3, 2, 7, 2, 3), nn.AvgPool2d(3, 2, 1), nn.Conv2d(2, 2, 3, 1, 1)), 40),
    "dilation": (chain(nn.Conv2d(3, 2, 3, 1, 2, dilation=2), nn.Conv2d(2, 2, 3, 2, 3, dilation=3)), 32),
    "even kernels": (chain(nn.Conv2d(3, 2, 4, 2, 1), nn.AvgPool2d(2), nn.Conv2d(2, 2, 2)), 32),
    "a pad of its own": (chain(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(3, 2, 4, 2), nn.Conv2d(2, 2, 3, 1, 1)), 24),
    "padding='same'": (chain(nn.Conv2d(3, 2, 4, padding="same"), nn.Conv2d(2, 2, 3, 2, 1)), 20),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_field_is_what_the_gradient_reaches(name: str) -> None:
    model, size = CHAINS[name]
    last = str(len(model) - 1)  # type: ignore[arg-type]
    axis = geo.geometry(model, size, compare=False).output(last)[0]
    inside = 0
    for unit in range(axis.size):
        low, high = (end + unit * axis.jump for end in (axis.low, axis.high))
        first, end = reached(model, last, size, unit)
        assert first >= low and end <= high
        if low >= 0 and high < size:  # at an edge a dilated window may have its holes
            assert (first, end) == (low, high)
            inside += 1
    assert inside


def small() -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=2)
    model.maxpool = nn.AvgPool2d(3, 2, 1)  # the maximum would hide pixels
    return model


@pytest.mark.parametrize("layer", ["layer1.0", "layer2.0", "layer2.0.downsample", "layer3.0.conv1"])
def test_skip_paths_are_merged(layer: str) -> None:
    axis = geo.geometry(small(), 96, compare=False).output(layer)[0]
    unit = axis.size // 2
    low, high = (end + unit * axis.jump for end in (axis.low, axis.high))
    assert reached(small(), layer, 96, unit) == (max(low, 0), min(high, 95))


def test_a_branch_alone_and_its_sum_with_a_wider_skip() -> None:
    """The larger field of the two, which the order of the calls does not tell."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 3, 7, 2, 3), nn.Conv2d(3, 3, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.narrow(x)

    found = geo.geometry(Sum(), 33)
    assert found.output("")[0].field == 7 and found.output("narrow")[0].field == 1 and found.aligned


@pytest.mark.parametrize("fused", [False, True])
def test_of_resnets(fused: bool) -> None:
    """Worked out by hand: 7 + 2 (3 - 1) = 11 behind the stem, then 2 jumps for each 3x3."""
    for name, field in (("resnet18", 435), ("resnet50", 427)):
        model = named_models.build(name)
        found = geo.geometry(resnet_fused.fuse(model) if fused else model, 224)
        last = found.output("layer4")[0]
        assert (last.field, last.jump, last.size) == (field, 32, 7)
        assert found.output("layer1")[0].field == (43 if name == "resnet18" else 35)
        assert last.centre - 111.5 == -15.5 and not found.aligned and found.aligned_size == 225
        by_name = {layer.name: layer for layer in found.layers}
        assert by_name["conv1"].shift == (-0.5, -0.5) and by_name["maxpool"].shift == (-1.0, -1.0)
        assert not found.meetings and "followed up to avgpool" in found.notes[0]
    assert geo.geometry(model, 225, compare=False).aligned


@pytest.mark.parametrize("size", [30, 31, 32, 33])
@pytest.mark.parametrize(
    "kernel, stride, pads", [(3, 2, (1, 1)), (4, 2, (1, 1)), (7, 2, (3, 3)), (3, 3, (0, 1)), (4, 1, (1, 2))]
)
def test_a_layer_shifts_by_the_formula(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> None:
    """(padding after - padding before - what is left over) / 2."""
    before, after = pads
    model = nn.Sequential(nn.ZeroPad2d((before, after) * 2), nn.Conv2d(3, 1, kernel, stride))
    shift = sum(layer.shift[0] for layer in geo.geometry(model, size, compare=False).layers)
    assert shift == (after - before - (size + before + after - kernel) % stride) / 2


def test_the_proposed_fixes_keep_the_centre() -> None:
    torch.manual_seed(0)
    (layer,) = geo.geometry(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1)), 32, compare=False).layers
    assert layer.shift == (-0.5, -0.5) and layer.fix.startswith("a kernel of 4 x 4 with padding 1")
    assert "stride 1 and a blur of 4 taps, padded by 1 and 2, at stride 2" in layer.fix
    for kernel, padding in ((7, 3), (3, 1), (1, 0)):  # a stem's, a branch's, a projection's
        (layer,) = geo.geometry(nn.Sequential(nn.Conv2d(3, 4, kernel, 2, padding)), 32, compare=False).layers
        assert layer.fix.startswith(f"a kernel of {kernel + 1} x {kernel + 1} with padding {padding}")
        assert geo.geometry(nn.Sequential(nn.Conv2d(3, 4, kernel + 1, 2, padding)), 32, compare=False).aligned
    wider = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1))
    blurred = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReflectionPad2d((1, 2, 1, 2)), nn.Conv2d(4, 4, 4, 2, groups=4))
    for model in (wider, blurred):
        found = geo.geometry(model, 32, compare=False)
        assert found.output(str(len(model) - 1))[0].centre == 15.5
    even = geo.geometry(nn.Sequential(nn.Conv2d(3, 1, 4, padding="same")), 32, compare=False)
    assert not even.aligned and any("odd kernel" in layer.fix for layer in even.layers)


def test_paths_that_meet_apart() -> None:
    """ResNet-D pools its skip path, which keeps the centre, beside a strided 3x3, which does not."""
    pytest.importorskip("timm")
    found = geo.geometry(named_models.build("timm:resnet26d"), 224)
    assert {each.name: each.apart for each in found.meetings} == {
        "layer2.0": (2.0, 2.0),
        "layer3.0": (4.0, 4.0),
        "layer4.0": (8.0, 8.0),
    }
    assert "layer3.0 (add_) joins paths whose centres are 4 px apart" in found.table()


def test_gates_that_see_everything_are_named() -> None:
    pytest.importorskip("timm")
    found = geo.geometry(named_models.build("timm:seresnet50"), 64, compare=False)
    assert any("squeeze and excitation" in note and "layer4.2.se" in note for note in found.notes)


def test_beside_torchscan() -> None:
    """They agree on a chain; behind a projection torchscan's calls, chained in their order, count its stride twice."""
    pytest.importorskip("torchscan")
    net = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, 1, 2, dilation=2)
    )
    assert all(layer.torchscan == layer.field[0] for layer in geo.geometry(net, 64).layers)
    found = geo.geometry(small(), 64)
    differ = [layer.name for layer in found.layers if layer.torchscan != layer.field[0]]
    assert differ[0] == "layer2.0.downsample.0" and "torchscan's numbers differ from layer2.0.down" in found.table()


def test_the_model_is_left_as_it_was_and_json_is_written() -> None:
    model = resnet_fused.fuse(small()).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = geo.geometry(model, 64)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert json.loads(json.dumps(found.to_dict()))["stride"] == 32


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"input is 16 x 16, smaller than the total stride 32 of layer4.0.conv1; accepted: 32"
    ):
        geo.geometry(small(), 16)
    with pytest.raises(ValueError, match=r"refuses an input of 3 x 4 x 4: .*[Kk]ernel"):
        geo.geometry(nn.Sequential(nn.Conv2d(3, 1, 7)), 4)
    with pytest.raises(ValueError, match="this Sequential has no convolution or pooling of more than one pixel"):
        geo.geometry(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 16)
    with pytest.raises(ValueError, match=r"no layer with a grid is named 'layer4.0.covn1' .*near: 'layer4.0.conv1'"):
        geo.geometry(small(), 64, compare=False).output("layer4.0.covn1")

    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x[:, :, :1, :1].expand(-1, -1, 8, 8) + nn.functional.pad(x, (-4, -4, -4, -4))

    with pytest.raises(ValueError, match="joins paths with total strides 1, 2; accepted: paths of one stride"):
        geo.geometry(Unequal(), 16)
