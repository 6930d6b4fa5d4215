"""torch.compile around fused models: one graph, few of them, and the fused model's own results."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.small_net import picture, small_net
from torch import Tensor, nn
from torch._dynamo.utils import counters

from resnet_fused import BlockModules, StageModules, fuse, register_block
from resnet_fused.backends import compiled, folding, prepared
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.modules import adapters

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}  # float64: the same operators, and Dynamo's sums in another order


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def in_one_graph(model: nn.Module, dynamic: bool | None = None) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)


def leaky(model: nn.Module) -> nn.Module:
    """A parameter of an activation, which is a float that Dynamo makes a symbol of."""
    model[1].relu = nn.LeakyReLU(0.2)  # type: ignore[index, union-attr]
    return model


def uncommon(model: nn.Module) -> nn.Module:
    """A frozen norm, a cumulative average, one without statistics."""
    model[1].bn1.requires_grad_(False)  # type: ignore[index, union-attr]
    model[1].bn1.eval()  # type: ignore[index, union-attr]
    model[0].bn1.momentum = None  # type: ignore[index, union-attr]
    model[1].bn2.track_running_stats = False  # type: ignore[index, union-attr]
    return leaky(model)


class Attention(nn.Module):
    """A basic block with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.squeeze = (
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Linear(8, 8),
        )

    def gate(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.squeeze(pooled))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn(self.conv(x))
        return self.relu(branch * self.gate(branch.mean((2, 3)))[:, :, None, None] + x)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})
    register_block(
        Attention,
        lambda m: BlockModules((StageModules(m.conv, m.bn, m.relu),), "identity", gate=m.gate),  # type: ignore[arg-type]
    )


def with_gate(model: nn.Module) -> nn.Module:
    model[1] = Attention()  # type: ignore[index]
    return model


def composite(_: nn.Module) -> nn.Module:
    """Two fused calls and a pooling between them."""
    resnet = pytest.importorskip("timm.models.resnet")
    return nn.Sequential(resnet.BasicBlock(3, 8, 2, resnet.downsample_avg(3, 8, 1, 2)), nn.Flatten())


def deep_stem(_: nn.Module) -> nn.Module:
    resnet = pytest.importorskip("timm.models.resnet")
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 0, 0), num_classes=3, channels=(8, 8, 8, 8), stem_width=8)


MODELS: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "blocks": (lambda model: model, {}),
    "uncommon norms, low memory": (uncommon, {"memory": "low"}),
    "gate": (with_gate, {}),
    "composite": (composite, {}),
}


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """A training step's output and the gradient of its input; those of the parameters stay with them."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    assert x.grad is not None
    return {"output": out.detach(), "gradient": x.grad}


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(got.state_dict(), expected.state_dict(), **TOLERANCE)
    for ours, theirs in zip(got.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)


@pytest.mark.usefixtures("gated")
@pytest.mark.parametrize("name", MODELS)
def test_trains_and_evaluates_in_one_graph_each(name: str) -> None:
    """Steps, statistics and evaluation are the fused model's, and going back to a mode compiles nothing."""
    change, arguments = MODELS[name]
    torch.manual_seed(0)
    model = fuse(change(small_net()).double(), **arguments)
    twin, x = copy.deepcopy(model), picture().double()
    run = in_one_graph(model)
    for _ in range(2):
        torch.testing.assert_close(step(run, x), step(twin, x), **TOLERANCE)
        with torch.no_grad():
            for each in (model, twin):
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
        modes = [module.training for module in model.modules()]
        with torch.no_grad():
            model.eval(), twin.eval()
            torch.testing.assert_close(run(x), twin(x), **TOLERANCE)
        for each in (model, twin):
            for module, mode in zip(each.modules(), modes, strict=True):
                module.training = mode
    assert_same_state(model, twin)
    assert graphs() == 2


@pytest.mark.parametrize(("dynamic", "train"), [(None, True), (True, True), (True, False)])
def test_other_batches_compile_nothing(dynamic: bool | None, train: bool) -> None:
    """Automatic dynamic shapes take one more graph, at the second size."""
    model = fuse(leaky(small_net()).double()).train(train)
    twin, run = copy.deepcopy(model), in_one_graph(model, dynamic)
    for n in (4, 6, 3, 5):
        x = picture().double().repeat(2, 1, 1, 1)[:n]
        with torch.set_grad_enabled(train):
            got, expected = (step(m, x) if train else m(x) for m in (run, twin))
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert graphs() == (1 if dynamic else 2)
    assert_same_state(model, twin)


@pytest.mark.parametrize(("last", "train"), [(False, True), (True, False)])
def test_layouts_under_autocast(last: bool, train: bool) -> None:
    """The graph's results have the strides and the dtype that the fused model's have."""
    form = torch.channels_last if last else torch.contiguous_format
    model = fuse(small_net()[:2]).to(memory_format=form).train(train)  # type: ignore[call-overload, index]
    twin, x = copy.deepcopy(model), picture().contiguous(memory_format=form)
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
        got, expected = in_one_graph(model)(x), twin(x)
    assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_inductor_gives_the_same() -> None:
    model = fuse(small_net().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    twin, x = copy.deepcopy(model), picture().contiguous(memory_format=torch.channels_last)
    run = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(step(run, x), step(twin, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-5)


# --- evaluation, which keeps what it folds ---------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was folded or packed, block by block."""
    seen: list[str] = []
    for module, name in ((folding, "_fold"), (prepared, "_prepare")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, name=name: [seen.append(name), original(*a)][1])
    return seen


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m[0].conv1.weight.data.neg_(),  # type: ignore[index, union-attr]
    "with a version": lambda m: m[1].bn2.bias.add_(1),  # type: ignore[index, union-attr]
    "statistics": lambda m: m[1].bn1.running_mean.add_(1),  # type: ignore[index, union-attr]
    "a state dict": lambda m: m.load_state_dict(
        {k: -v for k, v in m.state_dict().items() if "weight" in k}, strict=False
    ),
    "another parameter": lambda m: setattr(m[1].conv1, "weight", nn.Parameter(-m[1].conv1.weight)),  # type: ignore[index, union-attr, operator]
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_weights_are_folded_once_until_they_change(name: str, made: list[str]) -> None:
    model = fuse(small_net()).eval()
    run, x = in_one_graph(model), picture()
    before = [run(x) for _ in range(3)][-1]
    assert len(made) == 2, "once for each block"
    WRITES[name](model)
    torch.testing.assert_close(run(x), copy.deepcopy(model)(x), rtol=0, atol=0)
    assert not torch.allclose(run(x), before)


@torch.no_grad()
def test_what_is_kept_ends_with_the_weights() -> None:
    def bare() -> nn.Module:
        block = BasicBlock(3, 3)
        block.bn1, block.bn2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        return nn.Sequential(block)

    for make in (small_net, bare):
        model = fuse(make()).eval()
        torch.compiler.reset()
        gc.collect()  # what earlier tests have left
        before = len(compiled._kept)
        in_one_graph(model)(picture())
        assert len(compiled._kept) == before + sum(isinstance(m, BasicBlock) for m in model.modules())
        del model
        torch.compiler.reset()
        gc.collect()
        assert len(compiled._kept) == before


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_not_finite_is_computed_as_in_eager(autocast: bool) -> None:
    model = fuse(small_net()).eval()
    model[0].conv2.weight.view(-1)[0] = torch.inf  # type: ignore[index, union-attr]
    run = in_one_graph(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = run(picture()), copy.deepcopy(model)(picture())
    assert not expected.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_a_stem_pools_what_it_computes() -> None:
    pytest.importorskip("timm")
    model = fuse(deep_stem(small_net())).eval()
    x = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(in_one_graph(model)(x), copy.deepcopy(model)(x), rtol=0, atol=0)
    assert graphs() == 1
