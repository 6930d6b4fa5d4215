"""A module is described once, until something about it changes; whatever changes is seen at the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.blocks import block as any_block
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resnet_fused import BlockModules, StageModules, functional, fuse, models, register_block, unfuse
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.modules import adapters
from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.ops import validation


def basic_block() -> nn.Module:
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    return BasicBlock(4, 6, 2, downsample).double()


def picture() -> Tensor:
    return torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the modules that were described, call by call."""
    seen: list[str] = []
    original = FusedModule.fused_describe

    def note(self: FusedModule) -> object:
        seen.append(type(self).__name__)
        return original(self)

    monkeypatch.setattr(FusedModule, "fused_describe", note)
    return seen


@pytest.mark.parametrize("train", [True, False])
def test_described_and_checked_once(train: bool, described: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[torch.Size] = []
    original = validation.check
    monkeypatch.setattr(validation, "check", lambda x, *rest: [checks.append(x.shape), original(x, *rest)][1])
    fused = fuse(basic_block()).train(train)
    for _ in range(3):
        for size in (7, 8):
            fused(picture()[:, :, :size].requires_grad_(train)).sum().backward()
            fused.zero_grad()
    assert described == ["FusedBasicBlock"]
    assert len(checks) == 1


def hook(module: nn.Module) -> None:
    module.conv2.register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[union-attr]


def replace_forward(module: nn.Module) -> None:
    module.bn1.forward = lambda x: x * 2  # type: ignore[union-attr, method-assign]


def replace_parameter(module: nn.Module) -> None:
    module.conv1.weight = nn.Parameter(module.conv1.weight.detach() * 2)  # type: ignore[union-attr, operator]


def replace_child(module: nn.Module) -> None:
    module.bn2 = nn.BatchNorm2d(6, eps=0.1).double().train(module.training)


def replace_activation(module: nn.Module) -> None:
    module.relu = nn.Identity()


def parametrized(module: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module.conv2, "weight", Twice())  # type: ignore[arg-type]


def subclassed(module: nn.Module) -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module.bn1.__class__ = Doubled  # type: ignore[assignment]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "stride": lambda m: [setattr(m.conv1, "stride", (1, 1)), setattr(m.downsample[0], "stride", (1, 1))],  # type: ignore[index, union-attr]
    "dilation": lambda m: [setattr(m.conv2, "dilation", (2, 2)), setattr(m.conv2, "padding", (2, 2))],
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "momentum": lambda m: setattr(m.downsample[1], "momentum", 0.9),  # type: ignore[index, union-attr]
    "mode of one norm": lambda m: m.bn1.train(not m.training),  # type: ignore[union-attr]
    "tracking": lambda m: setattr(m.bn2, "track_running_stats", False),
    "no affine": lambda m: [setattr(m.bn2, "weight", None), setattr(m.bn2, "bias", None)],
    "a bias": lambda m: setattr(m.conv1, "bias", nn.Parameter(torch.ones(6, dtype=torch.float64))),
    "a hook": hook,
    "a hook on downsample": lambda m: m.downsample.register_forward_hook(lambda *a: a[-1] * 2),  # type: ignore[union-attr]
    "a replaced forward": replace_forward,
    "a parameter": replace_parameter,
    "a child": replace_child,
    "an activation": replace_activation,
    "a parametrization": parametrized,
    "a class": subclassed,
    "no downsample": lambda m: [
        setattr(m, "conv1", nn.Conv2d(4, 4, 3, 1, 1).double()),
        setattr(m, "bn1", nn.BatchNorm2d(4).double()),
        setattr(m, "conv2", nn.Conv2d(4, 4, 3, 1, 1).double()),
        setattr(m, "bn2", nn.BatchNorm2d(4).double()),
        setattr(m, "downsample", None),
    ],
    "another dtype and back": lambda m: m.float().double(),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen_at_the_next_call(name: str, train: bool) -> None:
    eager = basic_block().train(train)
    fused = fuse(copy.deepcopy(eager))
    with torch.no_grad():
        torch.testing.assert_close(fused(picture()), eager(picture()), rtol=1e-10, atol=1e-10)
        before = copy.deepcopy(fused)(picture())
        for module in (eager, fused):
            torch.manual_seed(2)
            CHANGES[name](module)
        expected, got = eager(picture()), fused(picture())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-10, atol=1e-10)
    if name not in ("momentum", "tracking", "no affine", "a bias", "another dtype and back"):
        assert before.shape != got.shape or not torch.allclose(before, got), "the change changes nothing"


def test_a_global_hook_is_seen(described: list[str]) -> None:
    fused, seen = fuse(basic_block()).eval(), []
    fused(picture())
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        fused(picture())
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 3
    fused(picture())
    assert described == ["FusedBasicBlock"] * 3


def test_a_shallow_copy_is_described_for_itself() -> None:
    """``copy.copy`` and nn.DataParallel's replicas share what the original keeps."""
    fused = fuse(basic_block()).eval()
    fused(picture())
    copied = copy.copy(fused)
    copied._modules = dict(fused._modules)
    copied.bn2 = nn.BatchNorm2d(6, eps=0.5).double().eval()
    for _ in range(2):
        eager = unfuse(copy.deepcopy(copied))
        torch.testing.assert_close(copied(picture()), eager(picture()), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fused(picture()), unfuse(copy.deepcopy(fused))(picture()), rtol=1e-10, atol=1e-10)


def test_the_stem_is_described_once(described: list[str]) -> None:
    eager = models.resnet18(fused=False, num_classes=3).double().eval()
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    kept = []
    for _ in range(2):
        torch.testing.assert_close(fused(x), eager(x))
        kept.append(list(fused._fused_description.runs.values()))  # type: ignore[union-attr, arg-type]
    assert len(described) == 8 and len(kept[0]) == 2  # the stem's run and the head's
    assert all(a is b for a, b in zip(*kept, strict=True))
    for model in (eager, fused):
        model.maxpool = nn.MaxPool2d(2, 2)
        model.bn1.eps = 0.1  # type: ignore[assignment, union-attr]
    torch.testing.assert_close(fused(x), eager(x))


class Rescaled(nn.Module):
    """A block whose adapter reads what no snapshot of it holds."""

    factor: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, 1, 1).double(), nn.BatchNorm2d(4).double()
        self.factor = [0.5]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) * self.factor[0] + x)


def test_a_registered_adapter_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})
    register_block(
        Rescaled,
        lambda m: BlockModules((StageModules(m.conv, m.bn, "relu"),), "identity", branch_scale=m.factor[0]),  # type: ignore[arg-type]
    )
    eager = Rescaled().eval()
    fused = fuse(copy.deepcopy(eager))
    folded = []
    for factor in (0.5, 0.5, -2.0):
        eager.factor[0] = fused.factor[0] = factor
        with torch.no_grad():
            torch.testing.assert_close(fused(picture()), eager(picture()))
        folded.append(fused._fused_description.block[0].kept.folded.made)  # type: ignore[index, union-attr]
    assert folded[0] is folded[1] is not folded[2]


def test_parameters_that_change_are_checked_again() -> None:
    x, params, spec = any_block(2, channels=4).build()
    functional.residual_block(x, params, spec)
    params.stages[0].weight.data = params.stages[0].weight.data.float()
    with pytest.raises(TypeError, match=r"is torch\.float32"):
        functional.residual_block(x, params, spec)
    params.stages[0].weight.data = torch.randn(3, 5, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="receives 4 channels"):
        functional.residual_block(x, params, spec)


def test_many_shapes_do_not_pile_up() -> None:
    x, params, spec = any_block(1, "none", kernel=1, batch_stats=False).build()
    for n in range(1, 200):
        functional.residual_block(x[:1, :, :1, :1].expand(n, -1, -1, -1), params, spec)
    assert len(params.kept.checked.counts) <= validation.MOST_INPUTS + 1


def test_copies_begin_with_nothing_kept() -> None:
    x, params, spec = any_block(1, "none", kernel=1, batch_stats=False).build()
    with torch.no_grad():
        functional.residual_block(x, params, spec)
    assert params.kept.folded is not None and params.kept.checked is not None
    for copied in (copy.deepcopy(params), replace(params)):
        assert copied.kept.folded is None and copied.kept.checked is None
