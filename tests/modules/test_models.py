"""The ResNet family: torchvision's names and results; and torchvision's own models, fused."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from support.equivalence import assert_as_accurate, relative_error
from support.training import assert_trains_as_eager
from torch import Tensor, nn

from resnet_fused import explain, fuse, models, unfuse
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.stem import FusedStem

OWN = {"plain18", "plain34", "plain50", "small_resnet"}  # tests/models has these
FAMILY = [name for name in models.__all__ if name.islower() and name not in OWN]
SHORT: dict[str, Any] = {"layers": (2, 1, 1, 1), "num_classes": 5}


@pytest.fixture
def torchvision() -> Any:
    return pytest.importorskip("torchvision")


def pictures(n: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


# --- this package's models -------------------------------------------------------------------------------------------


def test_the_family_is_torchvisions(torchvision: Any) -> None:
    public = vars(torchvision.models.resnet)["__all__"]
    assert set(FAMILY) == {name for name in public if name.islower()}


@pytest.mark.parametrize("name", FAMILY)
def test_names_and_shapes_are_torchvisions(name: str, torchvision: Any) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(torchvision.models, name)()
    assert list(shapes(ours).items()) == list(shapes(theirs).items())
    blocks = [module for module in ours.modules() if isinstance(module, (models.BasicBlock, models.Bottleneck))]
    assert all(isinstance(module, FusedModule) for module in [ours, *blocks])
    assert getattr(models, name).__name__ == name


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("resnet18", {"zero_init_residual": True, "num_classes": 7}),
        ("resnet50", {"zero_init_residual": True}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnext50_32x4d", {"norm_layer": lambda width: nn.BatchNorm2d(width, eps=1e-3)}),
    ],
)
def test_weights_and_logits_are_torchvisions(name: str, arguments: dict[str, Any], torchvision: Any) -> None:
    """One seed gives the same initial weights, strict loading works, and the logits agree."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(**arguments).eval()
    torch.manual_seed(0)
    ours = getattr(models, name)(fused=False, **arguments).eval()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())

    fused = getattr(models, name)(**arguments).eval()
    fused.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        expected = theirs(pictures())
        assert torch.equal(ours(pictures()), expected)
        exact = theirs.double()(pictures().double())
        assert_as_accurate("logits", fused(pictures()), expected, exact)


@pytest.mark.parametrize("name", FAMILY)
def test_each_member_trains_as_eager(name: str) -> None:
    """At reduced depth, which repeats the same blocks."""
    torch.manual_seed(0)
    assert_trains_as_eager(getattr(models, name)(**SHORT), pictures(2, 48, 48))


def test_a_dilated_model_trains_as_eager() -> None:
    torch.manual_seed(0)
    model = models.resnet50(replace_stride_with_dilation=(False, True, True), **SHORT)
    assert_trains_as_eager(model, pictures(2, 48, 48))


def test_factories_pass_on_what_fuse_takes() -> None:
    assert not any(isinstance(m, FusedModule) for m in models.resnet18(fused=False, **SHORT).modules())
    model = models.resnet18(backend="eager", memory="low", **SHORT)
    assert {row.backend for row in explain(model)} == {"eager"}
    assert model.layer2[0].fused_describe()[1].memory == "low"
    with pytest.raises(ValueError, match="unknown backend"):
        models.resnet18(backend="cuda", **SHORT)


def test_factories_and_models_pickle() -> None:
    assert pickle.loads(pickle.dumps(models.resnet18)) is models.resnet18
    model = models.resnet18(**SHORT).eval()
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(pictures()), model(pictures()))


def test_arguments_that_fit_no_model() -> None:
    with pytest.raises(ValueError, match="four counts, and None or three bools"):
        models.resnet18(layers=(2, 2, 2))
    with pytest.raises(ValueError, match="four counts, and None or three bools"):
        models.resnet50(replace_stride_with_dilation=(True,))
    with pytest.raises(ValueError, match="use Bottleneck"):
        models.resnet18(groups=2)
    with pytest.raises(ValueError, match="use Bottleneck"):
        models.resnet18(replace_stride_with_dilation=(False, False, True))


# --- torchvision's models, fused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_torchvision_resnet18_trains_as_eager(autocast: torch.dtype | None, torchvision: Any) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    assert_trains_as_eager(model, pictures(4, 48, 48), steps=5, autocast=autocast)


def test_torchvision_models_are_fused_whole(torchvision: Any) -> None:
    model = torchvision.models.resnet50()
    assert fuse(model) is model
    assert isinstance(model, torchvision.models.ResNet)
    rows = explain(model)
    assert [row.block for row in rows] == ["ResNet"] + ["Bottleneck"] * 16
    assert not any("unfused" in row.reason or "accepted" in row.reason for row in rows)
    assert type(unfuse(model)) is torchvision.models.ResNet


@pytest.mark.parametrize("shape", [(1, 97, 131), (2, 33, 32), (0, 64, 64), (1, 32, 32)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sizes_behave_as_in_pytorch(shape: tuple[int, int, int], mode: str, torchvision: Any) -> None:
    """1x32x32 leaves the last layer one value per channel, which training refuses."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).train(mode == "train")
    fused, exact, x = fuse(copy.deepcopy(model)), copy.deepcopy(model).double(), pictures(*shape)
    if mode == "train" and shape == (1, 32, 32):
        for each in (model, fused):
            with pytest.raises(ValueError, match=r"(?i)expected more than 1 value"):
                each(x)
        return
    expected = exact(x.double())
    # fused blocks convolve in channels_last, where oneDNN rounds differently
    last = torch.channels_last
    eager = [model(x), copy.deepcopy(model).to(memory_format=last)(x.contiguous(memory_format=last))]  # type: ignore[call-overload]
    worse = max(eager, key=lambda logits: relative_error(logits, expected))
    assert_as_accurate("logits", fused(x), worse, expected)


# --- stems -----------------------------------------------------------------------------------------------------------


def stem_reason(model: nn.Module) -> str:
    (row,) = (row for row in explain(model) if row.name == "")
    return row.reason


@pytest.mark.parametrize(
    ("pool", "fused"),
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1)), True),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.MaxPool2d(2), False),
        (nn.MaxPool2d(3, 2, 1, dilation=2), False),
        (nn.AvgPool2d(3, 2, 1), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_a_stem_with_another_pooling(pool: nn.Module, fused: bool) -> None:
    """The convolution stays fused; the pooling is the model's own."""
    torch.manual_seed(0)
    model = models.resnet18(fused=False, layers=(1, 1, 1, 1), num_classes=5)
    model.maxpool = pool
    assert_trains_as_eager(model, pictures(4, 32, 32))
    reason = stem_reason(fuse(model))
    assert ("maxpool is" in reason) is not fused


def test_a_stem_with_another_convolution() -> None:
    """As for small pictures: any convolution, norm and ReLU in the three places."""
    torch.manual_seed(0)
    model = models.resnet18(fused=False, layers=(1, 1, 1, 1), num_classes=5)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    assert_trains_as_eager(model, pictures(2, 16, 16))


@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "maxpool"])
def test_hooks_in_the_stem_run(part: str) -> None:
    model, calls = models.resnet18(**SHORT), []
    getattr(model, part).register_forward_hook(lambda *_: calls.append(part))
    model(pictures())
    assert calls == [part]
    assert "has hooks, which would not run" in stem_reason(model)


def test_a_stem_that_is_not_fusable_leaves_the_blocks_fused() -> None:
    model = models.resnet18(fused=False, **SHORT)
    model.bn1 = nn.GroupNorm(4, 64)
    expected = model(pictures())
    assert not isinstance(fuse(model), FusedStem)
    assert isinstance(model.layer1[0], FusedModule)
    assert "stages[0].norm is GroupNorm" in stem_reason(model)
    torch.testing.assert_close(model(pictures()), expected)


def test_feature_extraction_by_tracing(torchvision: Any) -> None:
    """torchvision's create_feature_extractor traces, and gets the original modules."""
    model = torchvision.models.resnet18().eval()
    nodes = {"layer1": "low", "layer3.0.bn2": "high"}
    extract = importlib.import_module("torchvision.models.feature_extraction").create_feature_extractor
    expected = extract(copy.deepcopy(model), nodes)(pictures())
    got = extract(fuse(model), nodes)(pictures())
    assert {name: value.shape for name, value in got.items()} == {k: v.shape for k, v in expected.items()}
    torch.testing.assert_close(got, expected)
