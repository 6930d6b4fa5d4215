"""Stems outside of the libraries' own classes: subclasses, extractors, containers, a user's forward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules import runs
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.stem import FusedStem

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
tv = torchvision.models.resnet


class Stem(nn.Module):
    """The children of a small stem, for forwards of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)


class Statements(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        return self.maxpool(x)


class Nested(Stem):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.maxpool(out)
        return out


class OtherNames(Stem):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.bn1(y)
        return self.maxpool(self.relu(z))


class Held(nn.Module):
    """A network that calls the children of another."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Stem()

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.conv1(x)
        x = self.backbone.bn1(x)
        x = self.backbone.relu(x)
        return self.backbone.maxpool(x)


class Activated(Stem):
    """Returns what is activated as well, as segmentation encoders do: the pooling is not part of the fused call."""

    def forward(self, x: Tensor) -> Tensor:
        features = []
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        features.append(x)
        x = self.maxpool(x)
        return x + features[0][..., ::2, ::2]


FUSED: dict[str, tuple[type[nn.Module], bool]] = {
    "statements": (Statements, True),
    "nested calls": (Nested, True),
    "other names": (OtherNames, True),
    "children of a child": (Held, True),
    "features taken": (Activated, False),
}


@pytest.mark.parametrize(("cls", "pooled"), FUSED.values(), ids=FUSED)
def test_a_run_of_children_is_fused_wherever_it_is_called(cls: type[nn.Module], pooled: bool) -> None:
    model = cls()
    assert_trains_as_eager(model, torch.randn(3, 3, 17, 17))
    names = list(model.state_dict())
    fuse(model)
    assert isinstance(model, FusedStem) is (cls is not Activated)  # which adds, and so is a block of an unknown class
    if isinstance(model, FusedStem):
        assert any("maxpool" in run[-1] for run in model._fused_runs) is pooled
    assert list(model.state_dict()) == names
    assert type(unfuse(model)) is cls


class Between(Stem):
    """Each of these forwards sees what lies between the calls."""

    seen: Tensor


class TakenAfterConvolution(Between):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.relu(self.bn1(y))
        return z + y


class KeptOnTheModule(Between):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.seen = x
        x = self.bn1(x)
        return self.relu(x)


class SeenByAFunction(Between):
    def forward(self, x: Tensor) -> Tensor:
        self.now = lambda: x  # which a hook of bn1 may call
        x = self.conv1(x)
        x = self.bn1(x)
        return self.relu(x)


class UnderTry(Between):
    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.conv1(x)
            x = self.bn1(x)
            x = self.relu(x)
        except RuntimeError:
            pass
        return x


@pytest.mark.parametrize("cls", [TakenAfterConvolution, KeptOnTheModule, SeenByAFunction, UnderTry])
def test_nothing_is_merged_that_somebody_sees(cls: type[nn.Module]) -> None:
    assert not any("conv1" in run for run in runs.merged(cls)[1])


def test_what_lies_between_stays_reachable_from_outside() -> None:
    model, x = Statements().eval(), torch.randn(2, 3, 9, 9)
    fused = fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused.conv1(x), model.conv1(x), rtol=0, atol=0)
    torch.testing.assert_close(fused.bn1(fused.conv1(x)), model.bn1(model.conv1(x)), rtol=0, atol=0)
    seen: list[Tensor] = []
    handle = fused.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0)  # eager's own
    torch.testing.assert_close(seen[0], model.bn1(model.conv1(x)), rtol=0, atol=0)
    assert "has hooks" in explain(fused)[0].reason
    handle.remove()
    assert explain(fused)[0].reason.count("hooks") == 0


def test_replaced_children_are_seen() -> None:
    model, x = Statements().eval(), torch.randn(2, 3, 9, 9)
    fused = fuse(copy.deepcopy(model))
    fused(x)
    for each in (model, fused):
        each.maxpool, each.relu = nn.AvgPool2d(2), nn.ReLU6()
    torch.testing.assert_close(fused(x), model(x))
    for each in (model, fused):
        del each.relu
        each.relu = torch.tanh  # no module: nothing of the run is fused
    torch.testing.assert_close(fused(x), model(x))


def test_a_source_that_is_not_the_methods_own_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Edited(Stem):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv1(x))

    Edited.forward.__code__ = Statements.forward.__code__.replace(co_firstlineno=Edited.forward.__code__.co_firstlineno)
    assert runs.merged(Edited) == ({}, ())


class Encoder(tv.ResNet):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.layer2(self.layer1(x))


def small(cls: type[nn.Module] = tv.ResNet) -> nn.Module:
    torch.manual_seed(0)
    return cls(tv.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64)


def body(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model.children())[:5])


def test_a_subclass_and_a_sequence_of_children() -> None:
    x = torch.randn(2, 3, 33, 33)
    for model in (small(Encoder), body(small())):
        expected = copy.deepcopy(model).eval()
        fuse(model)
        assert isinstance(model, FusedModule)
        assert not any("unknown" in row.reason for row in explain(model))
        torch.testing.assert_close(model.eval()(x), expected(x))
        copied = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(copied(x), expected(x))


def test_a_sequence_trains_as_eager() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 5, 1)]
    layers[0].bias.requires_grad_(False)
    model = nn.Sequential(*layers)
    assert_trains_as_eager(model, torch.randn(3, 3, 17, 17))
    x = torch.randn(2, 3, 17, 17)
    fused = fuse(copy.deepcopy(model))
    assert type(fused[:2]) is nn.Sequential
    torch.testing.assert_close(fused[:2](x), model[:2](x), rtol=0, atol=0)


class Layer(Stem):
    """A single layer, in no network of known blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


def test_a_single_layer_of_an_unknown_class_is_left() -> None:
    (row,) = explain(Layer())
    assert "unknown block class" in row.reason


def test_a_convolution_and_norm_alone_are_left() -> None:
    """PyTorch is faster there, and a shortcut of a block of an unknown class is often just that."""
    model = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))])
    with pytest.warns(UserWarning, match="found no block"):
        fuse(model)


EXTRACTORS: dict[str, Any] = {
    "torchvision's getter": lambda: torchvision.models._utils.IntermediateLayerGetter(
        small(), {"layer1": "low", "layer2": "high"}
    ),
    "getter behind the activation": lambda: torchvision.models._utils.IntermediateLayerGetter(
        small(), {"relu": "low", "layer1": "high"}
    ),
    "getter of the convolution": lambda: torchvision.models._utils.IntermediateLayerGetter(
        small(), {"conv1": "low", "layer1": "high"}
    ),
    "timm's features": lambda: timm.create_model("resnet10t", features_only=True, out_indices=(0, 1)),
    "timm's features by name": lambda: timm.create_model(
        "resnet10t", features_only=True, out_indices=(1, 2), feature_cls="dict"
    ),
}


@pytest.mark.parametrize("make", EXTRACTORS.values(), ids=EXTRACTORS)
def test_feature_extractors(make: Any) -> None:
    model, x = make().eval(), torch.randn(2, 3, 33, 33)
    fused = fuse(copy.deepcopy(model))
    for checkpointing in (False, True):
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(checkpointing)
            fused.set_grad_checkpointing(checkpointing)
        expected, got = ({**out} if isinstance(out, dict) else dict(enumerate(out)) for out in (model(x), fused(x)))
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
    assert isinstance(fused, FusedStem) is ("conv1" not in getattr(model, "return_layers", {}))
    assert [name for name, _ in fused.items()] == [name for name, _ in model.items()]


def test_compiled() -> None:
    model, x = Held().eval(), torch.randn(2, 3, 17, 17)
    compiled = torch.compile(fuse(copy.deepcopy(model)), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_a_traced_stem_is_the_unfused_one() -> None:
    model = fuse(Statements().eval())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "conv1",
        "bn1",
        "relu",
        "maxpool",
    ]


def test_a_traced_extractor_fuses_the_blocks_that_it_keeps_whole() -> None:
    """Its forward is a graph, whose nodes anything may read: no stem is fused there."""
    make = torchvision.models.feature_extraction.create_feature_extractor
    model, x = small().eval(), torch.randn(2, 3, 33, 33)
    options = {"tracer_kwargs": {"leaf_modules": [tv.BasicBlock]}}
    extract = make(copy.deepcopy(model), ["relu", "layer1"], **options)
    expected = extract(x)
    fused = fuse(extract)
    assert isinstance(fused.get_submodule("layer1.0"), FusedModule) and not isinstance(fused, FusedStem)
    torch.testing.assert_close(fused(x), expected)
    torch.testing.assert_close(make(fuse(model), ["relu", "layer1"])(x), expected)
