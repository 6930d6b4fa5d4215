"""In evaluation a stem and the blocks behind it are one call, and nobody can tell: bits, hooks, changes, modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import explain, fuse, models
from resnet_fused.models.resnet import Bottleneck, ResNet
from resnet_fused.ops import operators

BLOCKS = 6  # the stem's call beside five bottlenecks


def network() -> nn.Module:
    """Small; the engine runs all of it in float32, on any processor."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (2, 1, 1, 1), width=8, num_classes=5).eval()
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.running_mean, std=0.3)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
    return model


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs blocks of few channels as it runs others."""
    original = operators.engine_faster_elsewhere

    def rule(*given: Any) -> str | None:
        reason = original(*given)
        return None if reason is not None and "padded" in reason else reason

    monkeypatch.setattr(operators, "engine_faster_elsewhere", rule)


def pictures(size: int = 33) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each joint call computed."""
    counts: list[int] = []
    original = operators.residual_blocks_prepared

    def note(x: Tensor, blocks: object) -> tuple[Tensor, int]:
        out, count = original(x, blocks)
        counts.append(count)
        return out, count

    monkeypatch.setattr(operators, "residual_blocks_prepared", note)
    return counts


@torch.no_grad()
def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    """What a mode watches is not taken together."""
    with Noting():
        return model(x)


class Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class NotingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def evaluated(model: nn.Module, x: Tensor, calls: int = 3) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for _ in range(calls)]


def assert_same(model: nn.Module, x: Tensor, calls: int = 3) -> None:
    """Every call gives, to the bit, what the blocks give one by one, and this is what eager's copy gives."""
    expected = one_by_one(model, x)
    assert all(torch.equal(got, expected) for got in evaluated(model, x, calls))
    eager = copy.deepcopy(model)
    for module in eager.modules():
        if hasattr(module, "_fused_from"):
            module.__class__ = module._fused_from
    torch.testing.assert_close(expected, evaluated(eager, x, 1)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_together_from_the_second_call_on_of_each_size(last: bool, joint: list[int]) -> None:
    model, form = fuse(network()), torch.channels_last if last else torch.contiguous_format
    for size in (33, 40):
        assert_same(model, pictures(size).contiguous(memory_format=form))
    # of one size the call under a mode, which is not together, and the first
    assert joint == [BLOCKS] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, joint: list[int]) -> None:
    model, x = fuse(network()), pictures()
    with torch.autocast("cpu", dtype):
        expected = one_by_one(model, x)
        assert expected.dtype == dtype
        assert all(torch.equal(got, expected) for got in evaluated(model, x))
    assert_same(model, x)


# --- what changes is seen ---------------------------------------------------------------------------------------------


def hook(model: nn.Module) -> None:
    model.layer1[1].register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[index, union-attr, operator]


def hook_before(model: nn.Module) -> None:
    model.layer2[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))  # type: ignore[index, union-attr, operator]


def hook_within(model: nn.Module) -> None:
    model.layer1[0].conv2.register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[index, union-attr, operator]


def hook_sequential(model: nn.Module) -> None:
    model.layer2.register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[union-attr, operator]


def replace_forward(model: nn.Module) -> None:
    model.layer1[1].forward = lambda x: x * 2  # type: ignore[index, union-attr]


def replace_block(model: nn.Module) -> None:
    model.layer1[1] = nn.Identity()  # type: ignore[index, operator]


def drop_block(model: nn.Module) -> None:
    del model.layer1[1]  # type: ignore[union-attr, operator]


def replace_sequential(model: nn.Module) -> None:
    model.layer1 = nn.Sequential(*reversed(model.layer1))  # type: ignore[arg-type]
    model.layer1[1].downsample = model.layer1[0].downsample = None
    model.layer1[0].conv1 = nn.Conv2d(8, 8, 1, bias=False)
    model.layer1[0].downsample = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)).eval()
    model.layer1[1].conv1 = nn.Conv2d(32, 8, 1, bias=False)


def write_weight(model: nn.Module) -> None:
    model.layer3[0].conv2.weight.data.mul_(2)  # type: ignore[index, union-attr]


def replace_weight(model: nn.Module) -> None:
    conv = model.layer3[0].conv2  # type: ignore[index, union-attr]
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def write_statistics(model: nn.Module) -> None:
    model.layer1[0].bn2.running_mean.add_(1)  # type: ignore[index, union-attr]


def write_stem(model: nn.Module) -> None:
    model.bn1.running_mean.add_(1)  # type: ignore[union-attr, operator]


def train_one(model: nn.Module) -> None:
    model.layer1[1].train()  # type: ignore[index, union-attr]


def not_finite(model: nn.Module) -> None:
    model.layer2[0].conv2.weight.data[0, 0, 0, 0] = torch.inf  # type: ignore[index, union-attr]


CHANGES: list[Callable[[nn.Module], None]] = [
    hook,
    hook_before,
    hook_within,
    hook_sequential,
    replace_forward,
    replace_block,
    drop_block,
    replace_sequential,
    write_weight,
    replace_weight,
    write_statistics,
    write_stem,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes(change: Callable[[nn.Module], None]) -> None:
    model, x = fuse(network()), pictures()
    before = evaluated(model, x)
    with torch.no_grad():
        change(model)
    after = evaluated(model, x)
    assert not torch.equal(after[0], before[0])
    assert_same(model, x)


def test_a_block_in_training_moves_its_statistics() -> None:
    model, x = fuse(network()), pictures()
    evaluated(model, x)
    train_one(model)
    moved = model.layer1[1].bn1.num_batches_tracked  # type: ignore[index, union-attr]
    evaluated(model, x)
    assert moved == 3


def test_weights_that_are_not_finite() -> None:
    model, eager, x = fuse(network()), network(), pictures()
    evaluated(model, x)
    for each in (model, eager):
        not_finite(each)
    for got in evaluated(model, x):
        assert torch.equal(got.isnan(), evaluated(eager, x, 1)[0].isnan())


def test_hooks_that_are_removed(joint: list[int]) -> None:
    model, x = fuse(network()), pictures()
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
        for name, module in model.named_modules()
        if name in ("layer1", "layer1.0", "layer4.0")
    ]
    evaluated(model, x)
    assert seen == ["layer1.0", "layer1", "layer4.0"] * 3
    joint.clear()
    for handle in handles:
        handle.remove()
    evaluated(model, x)
    assert joint == [BLOCKS, BLOCKS]


def test_global_hooks_run() -> None:
    model, x = fuse(network()), pictures()
    expected, seen = evaluated(model, x)[-1], []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        got = evaluated(model, x, 1)[0]
    finally:
        handle.remove()
    assert {model.layer1, model.layer1[0], model.layer4[0]} <= set(seen)  # type: ignore[index]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- who watches ------------------------------------------------------------------------------------------------------


def test_modes_see_each_block(joint: list[int]) -> None:
    model, x = fuse(network()), pictures()
    expected = evaluated(model, x)[-1]
    joint.clear()
    with torch.no_grad(), Noting() as noting:
        got = model(x)
    assert noting.seen.count("resnet_fused.residual_block_prepared.default") == BLOCKS
    with torch.no_grad(), NotingFunctions():
        assert torch.equal(model(x), got)
    assert torch.equal(got, expected) and not joint


def test_gradients_and_tangents(joint: list[int]) -> None:
    model, x = fuse(network()), pictures()
    expected = evaluated(model, x)[-1]
    joint.clear()
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
    with torch.no_grad(), forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
    assert tangent is not None and tangent.abs().sum() > 0
    got = torch.vmap(model)(x[:, None])
    torch.testing.assert_close(got[:, 0].detach(), expected, rtol=1e-4, atol=1e-4)
    assert not joint


def test_traced_after_it_has_run() -> None:
    model, x = fuse(network()), pictures()
    expected = evaluated(model, x)[-1]
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        exported = torch.export.export(model, (x,)).module()
    for graph in (traced, exported):
        torch.testing.assert_close(evaluated(graph, x, 1)[0], expected, rtol=1e-4, atol=1e-4)
    assert "residual_block" not in str(traced.inlined_graph)


def test_values_that_are_not_finite() -> None:
    model, eager, x = fuse(network()), network(), pictures()
    evaluated(model, x)
    x[1, :, 5, 5] = torch.nan
    got, expected = evaluated(model, x)[-1], evaluated(eager, x, 1)[0]
    assert got[1].isnan().all() and torch.equal(got.isnan(), expected.isnan())


def test_what_the_engine_gives_back_is_called_by_itself(joint: list[int]) -> None:
    """A grouped convolution whose input is not finite: PyTorch computes its block."""
    torch.manual_seed(0)
    eager = ResNet(Bottleneck, (2, 0, 0, 0), width=64, num_classes=5, groups=2).eval()
    model, x = fuse(copy.deepcopy(eager)), pictures()
    evaluated(model, x)
    x[1, :, 5, 5] = torch.inf
    got, expected = evaluated(model, x, 1)[0], evaluated(eager, x, 1)[0]
    assert joint == [3, 3, 1]  # the stem alone
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)


def test_copies() -> None:
    model, x = fuse(network()), pictures()
    expected = evaluated(model, x)[-1]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer1[0].conv1.weight.mul_(2)  # type: ignore[index, union-attr]
    assert not torch.equal(evaluated(twin, x)[-1], expected)
    assert torch.equal(evaluated(model, x)[-1], expected)


def test_own_networks_features() -> None:
    """A network that takes what lies between two Sequentials: its runs end there."""

    class Taken(type(models.resnet18(fused=False))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            first = self.layer1(x)
            second = self.layer2(first)
            return [first, second]

    torch.manual_seed(0)
    eager = Taken(Bottleneck, (2, 1, 1, 1), width=8, num_classes=5).eval()
    fused, x = fuse(copy.deepcopy(eager)), pictures()
    with torch.no_grad():
        for _ in range(3):
            for got, expected in zip(fused(x), eager(x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- the head ---------------------------------------------------------------------------------------------------------


class Row(ResNet):
    """As torchvision's: everything in a row."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)
        return x


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs whatever it can, on any processor."""
    monkeypatch.setattr(operators, "engine_faster_elsewhere", lambda *_: None)


def row(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Row(Bottleneck, (2, 1, 1, 1), width=8, num_classes=37).eval().to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("size", [33, 100])
def test_head(dtype: str, size: int, everywhere: None, joint: list[int]) -> None:
    given = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
    eager, x = row(given), pictures(size).to(given)
    model = fuse(copy.deepcopy(eager))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        expected = evaluated(eager, x, 1)[0]
        outs = evaluated(model, x)
    exact = evaluated(copy.deepcopy(eager).double(), x.double(), 1)[0]
    assert joint == [1, BLOCKS + 1, BLOCKS + 1]  # the head alone, then all
    for out in outs:
        assert torch.equal(out, outs[0])
        assert (out.dtype, out.shape, out.stride()) == (expected.dtype, expected.shape, expected.stride())
    error, eagers = ((out.double() - exact).norm() / exact.norm() for out in (outs[0], expected))
    assert error <= 2 * eagers + 4 * torch.finfo(torch.float32).eps


def write_linear(model: nn.Module) -> None:
    model.fc.weight.data.mul_(2)  # type: ignore[union-attr]


def replace_data(model: nn.Module) -> None:
    model.fc.weight.data = model.fc.weight.data * 2  # type: ignore[union-attr]


def write_bias(model: nn.Module) -> None:
    model.fc.bias.data.add_(1)  # type: ignore[union-attr]


def drop_bias(model: nn.Module) -> None:
    model.fc.bias = None  # type: ignore[union-attr, assignment]


def replace_linear(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.fc = nn.Linear(model.fc.in_features, 9)  # type: ignore[union-attr, arg-type]


def hook_linear(model: nn.Module) -> None:
    model.fc.register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[union-attr, operator]


def hook_pooling(model: nn.Module) -> None:
    model.avgpool.register_forward_hook(lambda m, args, out: out * 2)  # type: ignore[union-attr, operator]


def replace_pooling(model: nn.Module) -> None:
    model.avgpool = nn.AdaptiveMaxPool2d(1)


def weight_not_finite(model: nn.Module) -> None:
    model.fc.weight[3, 5] = torch.inf  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize(
    "change",
    [
        write_linear,
        replace_data,
        write_bias,
        drop_bias,
        replace_linear,
        hook_linear,
        hook_pooling,
        replace_pooling,
        weight_not_finite,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("network", [row, network], ids=["in the run", "by itself"])
def test_changes_of_the_head(change: Callable[[nn.Module], None], network: Callable[[], nn.Module], everywhere: None):
    eager, x = network(), pictures()
    model = fuse(copy.deepcopy(eager))
    before = evaluated(model, x)
    with torch.no_grad():
        for each in (eager, model):
            change(each)
    expected = evaluated(eager, x, 1)[0]
    for got in evaluated(model, x):
        assert not torch.equal(got, before[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_heads_gradients(everywhere: None) -> None:
    eager, x = row(), pictures()
    model = fuse(copy.deepcopy(eager))
    evaluated(model, x)
    for each in (eager, model):
        each(x).square().sum().backward()
    torch.testing.assert_close(model.fc.weight.grad, eager.fc.weight.grad, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


def test_heads_of_plain_pytorch(everywhere: None, joint: list[int]) -> None:
    eager, x = row(), pictures()
    got = evaluated(fuse(copy.deepcopy(eager), backend="eager"), x)
    assert torch.equal(got[-1], evaluated(eager, x, 1)[0]) and not joint


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "it and 5 blocks behind it are one call of the engine"),
        (hook_sequential, "it and 2 blocks behind it are one call of the engine"),
        (replace_forward, None),
    ],
)
def test_explain_says_what_is_one_call(change: Callable[[nn.Module], None] | None, said: str | None) -> None:
    model = fuse(network())
    if change is not None:
        change(model)
    stem = explain(model, pictures())[0]
    assert (said in stem.reason) if said is not None else "one call" not in stem.reason
    assert "one call" not in explain(model)[0].reason  # of a shape that nobody gave
    assert "one call" not in explain(model.train(), pictures())[0].reason


def test_explain_says_who_computes_the_head(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(row())
    said = explain(model, pictures())[0].reason
    assert "it, 5 blocks behind it and the head are one call of the engine" in said
    monkeypatch.setattr(model, "avgpool", nn.AdaptiveAvgPool2d(2))
    model.fc = nn.Linear(4 * model.fc.in_features, 3)  # type: ignore[union-attr, operator]
    said = explain(model, pictures())[0].reason
    assert "it and 5 blocks behind it are one call of the engine; PyTorch computes the head" in said
