"""Swapping fused blocks into models: everything that is not speed or memory stays as it was."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from support.training import assert_trains_as_eager, train
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BackendError, BlockModules, NotFusable, StageModules, explain, functional, fuse, unfuse
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import describe
from resnet_fused.modules.fused_block import FusedBlock, FusedModule
from resnet_fused.spec import Activation

FIRST = next(name for name, why_not in resnet_fused.backends().items() if why_not is None)  # what "auto" takes here
UNKNOWN = 'unknown block class; register_block(cls, adapter) teaches it, match="structure" looks for its parts'


def projection(inplanes: int, planes: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def net() -> nn.Sequential:
    """A bottleneck with projection and a basic block, with norms away from their initial identity."""
    torch.manual_seed(0)
    model = nn.Sequential(Bottleneck(8, 4, 2, projection(8, 16, 2)), BasicBlock(16, 16))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 8, 9, 10), generator=torch.Generator().manual_seed(1))


def fused_types(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if isinstance(module, FusedModule)]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the package logged so far, with nothing remembered from other tests as logged already."""
    from resnet_fused.modules import fused_block

    fused_block._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="resnet_fused"):
        yield lambda: [m for m in caplog.messages if "runs unfused" in m]


# --- in place, and back ----------------------------------------------------------------------------------------------


def test_fusing_changes_classes_and_nothing_else() -> None:
    model = net()
    state, parameters = model.state_dict(keep_vars=True), dict(model.named_parameters())
    modules = dict(model.named_modules())
    assert fuse(model) is model
    assert fused_types(model) == ["FusedBottleneck", "FusedBasicBlock"]
    assert isinstance(model[0], Bottleneck)
    assert isinstance(model[1], BasicBlock)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(m is modules[name] for name, m in model.named_modules())


@pytest.mark.parametrize("memory", ["default", "low"])
def test_trains_as_eager(memory: str) -> None:
    assert_trains_as_eager(net(), pictures(), steps=3, memory=memory)


def test_trains_as_eager_under_autocast() -> None:
    assert_trains_as_eager(net(), pictures(), autocast=torch.bfloat16)


def test_trains_as_eager_in_channels_last() -> None:
    model = net().to(memory_format=torch.channels_last)
    assert_trains_as_eager(model, pictures().to(memory_format=torch.channels_last))


def test_an_optimizer_built_before_sees_the_same_parameters() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    fuse(model)(pictures()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_unfuse_restores_classes_attributes_and_results() -> None:
    model, untouched = net(), net()
    attributes = [set(module.__dict__) for module in model.modules()]
    assert unfuse(fuse(model)) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert [set(module.__dict__) for module in model.modules()] == attributes
    expected = train(untouched, pictures())
    assert all(torch.equal(value, expected[name]) for name, value in train(model, pictures()).items())


def test_unfuse_refuses_a_class_that_was_changed_since() -> None:
    block = fuse(net())[1]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(TypeError, match="has become Sharded"):
        unfuse(block)


def test_fusing_twice_updates_the_settings() -> None:
    model = fuse(net())
    types = [type(m) for m in model.modules()]
    fuse(model, backend="eager", memory="low")
    assert [type(m) for m in model.modules()] == types
    assert model[0].fused_describe()[1].memory == "low"
    assert [row.backend for row in explain(model)] == ["eager", "eager"]


def test_a_single_block_is_a_model_too() -> None:
    block = BasicBlock(4, 4)
    assert isinstance(fuse(block), FusedBlock)
    assert type(unfuse(block)) is BasicBlock


def test_bad_arguments_change_nothing() -> None:
    model = net()
    for refuse in (fuse, unfuse, explain):
        with pytest.raises(TypeError, match=r"^model must be an nn.Module, got str$"):
            refuse("resnet50")  # type: ignore[arg-type, type-var]
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; accepted: 'auto'"):
        fuse(model, backend="cudnn")
    with pytest.raises(ValueError, match="memory must be one of 'default', 'low', got 'none'"):
        fuse(model, memory="none")  # type: ignore[arg-type]
    assert fused_types(model) == []


@pytest.mark.usefixtures("no_interpreter")
def test_a_backend_asked_for_by_name_raises_where_it_cannot_run() -> None:
    model = fuse(net(), backend="triton")
    with pytest.raises(BackendError, match="'triton' cannot run this block"):
        model(pictures())


# --- what fuse warns of -----------------------------------------------------------------------------------------------


def test_fusing_nothing_gives_the_first_reasons() -> None:
    group_norm = BasicBlock(8, 8, norm_layer=lambda width: nn.GroupNorm(2, width))
    with pytest.warns(UserWarning, match="fuse left blocks of this Sequential unfused") as caught:
        fuse(nn.Sequential(Unknown(), group_norm, Unknown(), Unknown()))
    (message,) = (str(warning.message) for warning in caught)
    assert f"0 (Unknown): {UNKNOWN}; " in message
    assert "; 1 (BasicBlock): stages[0].norm is GroupNorm; " in message and "; 2 (Unknown): " in message
    assert "; 3 (Unknown)" not in message and message.endswith("; and more, see resnet_fused.explain(model)")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="fuse found no block in this Sequential: no convolution with a batch norm"):
        fuse(nn.Sequential(nn.Linear(2, 2)))


def test_auto_without_the_extension_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.ops import operators

    told = operators.built_for_another("2.11.0+cpu", "2.13.1")
    monkeypatch.setattr(operators, "_load_error", told)
    with pytest.warns(
        UserWarning, match=r"plain PyTorch: .* built with torch 2.11.0\+cpu, and torch 2.13.1 is installed"
    ):
        fuse(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(net())
        fuse(net(), backend="eager")


# --- what else is done to models -------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_are_fused_and_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = fuse(net(), memory="low")
    twin = duplicate(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert twin[0].fused_describe()[1].memory == "low"
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    expected = train(model, pictures())
    assert all(torch.equal(value, expected[name]) for name, value in train(twin, pictures()).items())


def test_state_dict_loads_across() -> None:
    model, fused = net(), fuse(net())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    fused.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(fused.eval()(pictures()), model.eval()(pictures()))
    model.load_state_dict(fused.state_dict(), strict=True)


def test_evaluation_sees_weights_that_changed() -> None:
    """Also those written past the version counter, once the model has been in training mode."""
    model, fused = net().eval(), fuse(net()).eval()
    with torch.no_grad():
        fused(pictures())
        for each in (model, fused):
            each[0].bn1.weight.mul_(2)
        torch.testing.assert_close(fused(pictures()), model(pictures()))
        for each in (model, fused):
            each[0].conv2.weight.data.neg_()
            each.train().eval()
        torch.testing.assert_close(fused(pictures()), model(pictures()))


def test_inference_mode() -> None:
    with torch.inference_mode():
        torch.testing.assert_close(fuse(net()).eval()(pictures()), net().eval()(pictures()))


@pytest.mark.parametrize("frozen", ["", "conv1.weight", "bn2.bias", "downsample", "0."])
def test_parameters_without_gradient(frozen: str) -> None:
    model = net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_trains_as_eager(model, pictures())


def test_conversion_of_the_dtype() -> None:
    model = fuse(net()).double()
    expected = train(net().double(), pictures().double())
    for name, value in train(model, pictures().double()).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert_trains_as_eager(net().to(torch.bfloat16), pictures().to(torch.bfloat16))


def test_hooks_on_the_block_run() -> None:
    model, seen = fuse(net()), []
    block = model[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0].shape)))
    block.register_forward_hook(lambda module, args, out: out * 2)
    block.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(("backward", grad_in[0].shape)))
    out = block(pictures().requires_grad_())
    torch.testing.assert_close(out, 2 * net()[0](pictures()))
    out.sum().backward()
    assert seen == [("pre", (4, 8, 9, 10)), ("backward", (4, 8, 9, 10))]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_tracing_gets_the_original() -> None:
    model = fuse(net()).eval()
    symbolic, traced = torch.fx.symbolic_trace(model), torch.jit.trace(model, pictures())
    assert "bn1" in symbolic.code
    assert "aten::batch_norm" in str(traced.inlined_graph)
    for each in (symbolic, traced):
        torch.testing.assert_close(each(pictures(2, 8, 6, 5)), net().eval()(pictures(2, 8, 6, 5)))


def test_exported_and_compiled_graphs_hold_the_fused_operators() -> None:
    model, x = fuse(net()).eval(), pictures()
    with torch.no_grad():
        expected = net().eval()(x)
        with resnet_fused.export_fused():
            exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
    compiled = torch.compile(fuse(net()), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net()(x))
    fused = any("resnet_fused" in str(node.target) for node in exported.graph.nodes)
    assert fused is (FIRST == "native")


# --- batch norm, as nn.BatchNorm2d decides ---------------------------------------------------------------------------


def test_frozen_norms_in_a_training_model() -> None:
    model = net()
    for module in (model[0].bn1, model[0].downsample[1], model[1].bn2):
        module.eval()
    assert_trains_as_eager(model, pictures(), steps=2)


def without_counter(norm: nn.BatchNorm2d) -> None:
    norm.num_batches_tracked = None


def without_buffers(norm: nn.BatchNorm2d) -> None:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


NORMS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "no momentum": {"momentum": 0.0},
    "eps": {"eps": 0.1},
    "untracked": {"track_running_stats": False},
    "no affine": {"affine": False},
    "no affine, untracked": {"affine": False, "track_running_stats": False},
}
STATES: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "training": lambda norm: norm.train(),
    "eval": lambda norm: norm.eval(),
    "training, tracking switched off": lambda norm: setattr(norm.train(), "track_running_stats", False),
    "eval, tracking switched off": lambda norm: setattr(norm.eval(), "track_running_stats", False),
    "training without counter": lambda norm: without_counter(norm.train()),
    "eval without buffers": lambda norm: without_buffers(norm.eval()),
}


@pytest.mark.parametrize("arguments", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_norms_behave_as_batch_norm(arguments: dict, state: Callable[[nn.BatchNorm2d], object]) -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, 4, norm_layer=lambda width: nn.BatchNorm2d(width, **arguments))
    state(block.bn1)
    assert_trains_as_eager(block, pictures(3, 4, 5, 6), steps=3)


# --- describe --------------------------------------------------------------------------------------------------------


def stage(conv: nn.Module, norm: nn.Module | None = None, act: nn.Module | None = None) -> BlockModules:
    return BlockModules((StageModules(conv, norm, act),), skip="none")


def with_hook(module: nn.Module, kind: str = "register_forward_hook") -> nn.Module:
    getattr(module, kind)(lambda *_: None)
    return module


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


CONV = nn.Conv2d(4, 4, 3)
REFUSED = {
    r"stages\[0\].conv is Linear; accepted: nn.Conv2d": lambda: stage(nn.Linear(4, 4)),
    r"conv is LazyConv2d": lambda: stage(nn.LazyConv2d(4, 3)),
    r"padding='same' with an even kernel": lambda: stage(nn.Conv2d(4, 4, (3, 2), padding="same")),
    r"stages\[0\].norm is GroupNorm; accepted: nn.BatchNorm2d": lambda: stage(CONV, nn.GroupNorm(2, 4)),
    r"stages\[0\].act is SELU; accepted: nn.Identity, nn.ReLU": lambda: stage(CONV, None, nn.SELU()),
    r"act is 'prelu'": lambda: stage(CONV, None, "prelu"),
    r"stages\[0\].conv \(Conv2d\) has hooks": lambda: stage(with_hook(nn.Conv2d(4, 4, 3))),
    r"norm \(BatchNorm2d\) has hooks": lambda: stage(CONV, with_hook(nn.BatchNorm2d(4), "register_forward_pre_hook")),
    r"act \(ReLU\) has hooks": lambda: stage(CONV, None, with_hook(nn.ReLU(), "register_full_backward_hook")),
    r"act \(Identity\) has hooks": lambda: stage(
        CONV, None, with_hook(nn.Identity(), "register_full_backward_pre_hook")
    ),
    r"conv is ParametrizedConv2d": lambda: stage(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
    r"conv \(Conv2d\) has its forward replaced": lambda: stage(with_forward(nn.Conv2d(4, 4, 3))),
    r"projection.conv is Identity": lambda: BlockModules(
        (StageModules(CONV, None, None),), "projection", StageModules(nn.Identity(), None, None)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_describe_names_the_part_that_has_no_fused_form(reason: str) -> None:
    with pytest.raises(NotFusable, match=reason):
        describe(REFUSED[reason](), "default")


def test_global_hooks_would_not_run_for_the_children() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(NotFusable, match="global module hooks"):
            describe(stage(CONV), "default")
    finally:
        handle.remove()
    describe(stage(CONV), "default")


def test_describe_reads_every_attribute() -> None:
    conv = nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding="valid", dilation=(1, 2), groups=2)
    norm = nn.BatchNorm2d(8, eps=0.25, momentum=None)
    params, spec = describe(stage(conv, norm, nn.ReLU()), "low")
    (tensors,), (described,) = params.stages, spec.stages
    assert described.geometry == ((2, 1), (0, 0), (1, 2))
    assert (described.groups, described.eps, described.act, described.norm) == (2, 0.25, Activation("relu"), True)
    assert (spec.skip, spec.order, spec.memory) == ("none", "post", "low")
    assert tensors.weight is conv.weight
    assert tensors.bias is conv.bias
    assert tensors.norm_weight is norm.weight
    assert tensors.norm_bias is norm.bias
    assert tensors.running_mean is norm.running_mean
    assert tensors.running_var is norm.running_var
    assert tensors.num_batches_tracked is norm.num_batches_tracked
    assert tensors.momentum is None


def test_same_padding_and_a_norm_folded_away() -> None:
    conv = nn.Conv2d(4, 4, (5, 3), padding="same", dilation=(1, 2))
    _, spec = describe(stage(conv, nn.Identity(), nn.Identity()), "default")
    assert spec.stages[0].padding == (2, 2)
    assert (spec.stages[0].norm, spec.stages[0].act) == (False, Activation("identity"))


# --- blocks that are, or become, something else ----------------------------------------------------------------------


def test_an_inner_hook_runs_and_the_block_is_fused_again_without_it(messages: Callable[[], list[str]]) -> None:
    model, shapes = fuse(net()), []
    handle = model[1].conv1.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    expected = net()(pictures())
    torch.testing.assert_close(model(pictures()), expected)
    model(pictures())
    assert shapes == [(4, 16, 5, 5)] * 2
    reason = "stages[0].conv (Conv2d) has hooks, which would not run"
    assert messages() == [f"BasicBlock runs unfused: {reason}"]
    fused, hooked = explain(model)
    assert fused.backend == FIRST
    assert (hooked.backend, hooked.reason) == ("eager", reason)
    handle.remove()
    model(pictures())
    assert len(shapes) == 2
    assert [row.backend for row in explain(model)] == [FIRST, FIRST]


def test_a_hook_on_the_downsample_container_runs() -> None:
    model, calls = fuse(net()), []
    model[0].downsample.register_forward_hook(lambda *_: calls.append(1))
    model(pictures())
    assert calls == [1]


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("conv2", Doubled(16, 16, 3, padding=1)),
        ("bn1", nn.GroupNorm(4, 16)),
        ("relu", nn.SELU()),
        ("downsample", nn.AvgPool2d(1)),
    ],
)
def test_a_replaced_child_is_used(name: str, child: nn.Module) -> None:
    model, fused = net(), fuse(net())
    for each in (model, fused):
        setattr(each[1], name, copy.deepcopy(child))
    torch.testing.assert_close(fused(pictures()), model(pictures()))
    assert type(child).__name__ in explain(fused)[1].reason


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_alone_is_an_ordinary_batch_norm(training: bool) -> None:
    """Without other processes, whether converted before or after `fuse`, the block is fused as a whole."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    expected = fuse(net()).train(training)(pictures())
    for model in (convert(fuse(net())), fuse(convert(net()))):
        assert torch.equal(model.train(training)(pictures()), expected)
        assert [tuple(row[2:]) for row in explain(model)] == [
            tuple(row[2:]) for row in explain(fuse(net()).train(training))
        ]


class Wider(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn(self.conv(x)))


@pytest.mark.parametrize("block", [Wider(8, 8), Unknown()], ids=["subclass", "unknown"])
def test_unknown_blocks_are_left_alone(block: nn.Module) -> None:
    cls, expected = type(block), block(pictures())
    with pytest.warns(UserWarning, match=rf"unfused: \(model\) \({cls.__name__}\): unknown block class"):
        assert type(fuse(block)) is cls
    assert torch.equal(block(pictures()), expected)
    (row,) = explain(block)
    assert row == ("", cls.__name__, "eager", UNKNOWN)


# --- blocks of the user ----------------------------------------------------------------------------------------------


class ReZero(nn.Module):
    """x + alpha * F(x), alpha learned from 0 (arXiv:2003.04887); not from 0 here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return x + self.alpha * out


def rezero(block: ReZero) -> BlockModules:
    stages = (
        StageModules(block.first, block.first_norm, nn.ReLU()),
        StageModules(block.second, block.second_norm, None),
    )
    return BlockModules(stages, "identity", branch_scale=block.alpha)


class Scaled(nn.Module):
    """Both paths scaled by channel, as LayerScale (arXiv:2103.17239) does the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.rand(channels))
        self.keep = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.keep * x + self.gamma[:, None, None] * self.norm(self.conv(x))


def scaled(block: Scaled) -> BlockModules:
    stages = (StageModules(block.conv, block.norm, None),)
    return BlockModules(stages, "identity", branch_scale=block.gamma, skip_scale=block.keep)


class PreActivation(nn.Module):
    """ResNet v2 (arXiv:1603.05027): the projection reads the activated input."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inplanes), nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(inplanes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.bn1(x))
        return self.conv2(self.relu(self.bn2(self.conv1(first)))) + self.shortcut(first)


def pre_activation(block: PreActivation) -> BlockModules:
    stages = (
        StageModules(block.conv1, block.bn1, block.relu),
        StageModules(block.conv2, block.bn2, block.relu),
    )
    return BlockModules(stages, "projection", StageModules(block.shortcut, None, None), order="pre")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})
    resnet_fused.register_block(ReZero, rezero)
    resnet_fused.register_block(Scaled, scaled)
    resnet_fused.register_block(PreActivation, pre_activation)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_registered_blocks_train_as_their_own_forward(memory: str, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), PreActivation(8, 12, 2), ReZero(12))
    assert fused_types(fuse(copy.deepcopy(model))) == ["FusedPreActivation", "FusedReZero"]
    assert_trains_as_eager(model, pictures(), steps=2, memory=memory, autocast=autocast)


@pytest.mark.usefixtures("registered")
def test_scales_of_each_channel_are_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(8), Scaled(8))
    assert fused_types(fuse(copy.deepcopy(model))) == ["FusedScaled", "FusedScaled"]
    assert_trains_as_eager(model, pictures(), steps=3)


def test_register_block_refuses_what_is_no_block() -> None:
    with pytest.raises(TypeError, match=r"subclass of nn.Module"):
        resnet_fused.register_block(ReZero(4), rezero)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter must be callable"):
        resnet_fused.register_block(ReZero, BlockModules((), "none"))  # type: ignore[arg-type]
    assert adapters.find(ReZero) is None


@pytest.mark.usefixtures("registered")
def test_a_pickled_block_runs_unfused_where_it_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    block = ReZero(8)
    file = pickle.dumps(fuse(copy.deepcopy(block)))
    monkeypatch.setattr(adapters, "_registered", {})
    loaded = pickle.loads(file)
    assert torch.equal(loaded(pictures()), block(pictures()))
    assert "ReZero is not registered here; call register_block" in explain(loaded)[0].reason


# --- explain ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> nn.Sequential:
    return nn.Sequential(
        *net(), BasicBlock(8, 8, norm_layer=lambda width: nn.GroupNorm(2, width)), Unknown(), nn.ReLU()
    )


def test_explain_before_and_after_fusing(mixed: nn.Sequential, capsys: pytest.CaptureFixture[str]) -> None:
    not_yet = "not fused; call fuse(model)"
    group_norm = (
        "stages[0].norm is GroupNorm; accepted: nn.BatchNorm2d and nn.SyncBatchNorm themselves, FrozenBatchNorm2d"
    )
    left_alone = [("2", "BasicBlock", "eager", group_norm), ("3", "Unknown", "eager", UNKNOWN)]
    before = [("0", "Bottleneck", "eager", not_yet), ("1", "BasicBlock", "eager", not_yet)]
    assert explain(mixed) == before + left_alone
    capsys.readouterr()

    rows = explain(fuse(mixed))
    assert rows[2:] == left_alone
    assert [row[:3] for row in rows[:2]] == [("0", "Bottleneck", FIRST), ("1", "BasicBlock", FIRST)]
    printed = capsys.readouterr().out
    assert printed == f"{rows}\n"
    for word in ("name", "block", "backend", "reason", *(row.block for row in rows), FIRST, "GroupNorm"):
        assert word in printed
    assert repr(rows) == "<Explanation of 4 blocks>"


class ConvNorm(nn.Module):
    """A piece of a block, as timm's ConvNormAct."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class OfPieces(nn.Module):
    """Joins in a method, so that forward can checkpoint it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = ConvNorm(), nn.Sequential(ConvNorm(), ConvNorm())

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        out = self.rest(self.first(x))
        out += x
        return out


class Network(nn.Module):
    """Its own stem, blocks of pieces, a piece on its own, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([OfPieces(), OfPieces()])
        self.last = ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        x, count = self.bn(self.conv(x)), 0
        for block in self.blocks:
            x, count = block(x), count + 1
        return self.last(x)


class Classifier(ConvNorm):
    """No blocks, no joins: nothing to register."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)


def test_explain_shows_blocks_and_neither_pieces_nor_networks() -> None:
    rows = explain(Network())
    assert [row[:2] for row in rows] == [("blocks.0", "OfPieces"), ("blocks.1", "OfPieces"), ("last", "ConvNorm")]
    assert explain(Classifier()) == [] and explain(nn.ModuleList([nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)])) == []
    twice = OfPieces()
    assert [row.name for row in explain(nn.Sequential(twice, twice))] == ["0"]


def test_explain_shows_foreign_blocks_whole() -> None:
    timm = pytest.importorskip("timm")
    rows = explain(timm.create_model("ghostnet_100"))
    assert ("blocks.0.0", "GhostBottleneck") in [row[:2] for row in rows]
    assert not any(row.name.startswith("blocks.0.0.") for row in rows)
    assert {row.block for row in explain(timm.create_model("mobilenetv3_small_100"))} == {
        "DepthwiseSeparableConv",
        "InvertedResidual",
        "ConvBnAct",
    }


def test_explain_sums_up(mixed: nn.Sequential, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(mixed).summary == "0 of 4 blocks fused"
    capsys.readouterr()
    explanation = explain(fuse(mixed))
    assert capsys.readouterr().out.splitlines()[-1] == explanation.summary == "2 of 4 blocks fused"
    assert explain(fuse(mixed, backend="eager")).summary == "2 of 4 blocks fused, 2 of them in plain PyTorch"
    told = json.loads(explanation.to_json())
    assert (told["blocks"], told["fused"], told["summary"]) == (4, 2, explanation.summary)
    assert told["rows"][3] == {**explanation[3]._asdict(), "fused": False} and told["rows"][0]["fused"] is True


@pytest.mark.usefixtures("no_interpreter")
def test_explain_says_what_a_named_backend_does() -> None:
    model = fuse(net(), backend="triton")
    row = explain(model)[0]
    assert row.backend == "triton"
    assert row.reason.startswith("forward raises: Triton kernels")
    row = explain(fuse(model, backend="eager"))[0]
    assert (row.backend, row.reason) == ("eager", "asked for by name")


def test_explain_gives_the_reasons_of_backends_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused.backends import dispatch

    monkeypatch.setattr(type(dispatch.BACKENDS["native"]), "unavailable", lambda self: "no compiler")
    row = explain(fuse(net()))[0]
    assert row.backend == "eager"
    assert row.reason.startswith("native: no compiler; triton: ")


# --- sizes at the edge -----------------------------------------------------------------------------------------------


def outcome(model: nn.Module, x: Tensor) -> Tensor | type[Exception]:
    try:
        return model(x)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "shape", [(1, 8, 9, 7), (2, 8, 1, 1), (1, 8, 1, 1), (0, 8, 9, 7), (3, 8, 97, 131), (8, 9, 7)], ids=str
)
def test_sizes_behave_as_in_pytorch(shape: tuple[int, ...], mode: str) -> None:
    """The same result, or the same type of exception: one value per channel in training, say."""
    model = net()[0].train(mode == "train")
    fused = fuse(copy.deepcopy(model))
    expected, got = outcome(model, pictures(*shape)), outcome(fused, pictures(*shape))
    if isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected)
        assert got.requires_grad == expected.requires_grad
        torch.testing.assert_close(dict(fused.named_buffers()), dict(model.named_buffers()))
    else:
        assert got is expected


@pytest.mark.parametrize(
    "act",
    [F.relu, torch.relu, "relu", nn.ReLU(), nn.ReLU(inplace=True)],
    ids=["F.relu", "torch.relu", "name", "module", "in place"],
)
def test_activations_by_name_and_by_function(act: object) -> None:
    stage = StageModules(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)  # type: ignore[arg-type]
    assert describe(BlockModules((stage,), skip="none"), "default")[1].stages[0].act == Activation("relu")
    for none in (None, "identity", nn.Identity()):
        given = StageModules(stage.conv, stage.norm, none)
        assert describe(BlockModules((given,), skip="none"), "default")[1].stages[0].act == Activation("identity")
    for other in (F.selu, "selu", nn.SELU()):
        with pytest.raises(NotFusable, match=r"(?i)act is .*selu.*; accepted: nn.Identity, nn.ReLU, .*or None"):
            describe(BlockModules((StageModules(stage.conv, stage.norm, other),), skip="none"), "default")  # type: ignore[arg-type]


OTHERS = {
    "relu6": [nn.ReLU6(), F.relu6, "relu6"],
    "leaky_relu": [nn.LeakyReLU(), F.leaky_relu, "leaky_relu"],
    "silu": [nn.SiLU(), F.silu, "silu"],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
    "gelu": [nn.GELU(), F.gelu, "gelu"],
    "gelu_tanh": [nn.GELU("tanh")],
    "prelu": [nn.PReLU()],
}


@pytest.mark.parametrize(("name", "act"), [(name, act) for name, acts in OTHERS.items() for act in acts])
def test_other_activations(name: str, act: object) -> None:
    """A block with them computes what PyTorch's own modules would, in both directions."""
    children = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
    stage = StageModules(*children, act)  # type: ignore[arg-type]
    params, spec = describe(BlockModules((stage,), skip="identity"), "default")
    assert spec.stages[0].activation.name == name
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    got = functional.residual_block(x, params, spec, backend="native")
    function = {"leaky_relu": F.leaky_relu, "relu6": F.relu6, "gelu": F.gelu, "silu": F.silu}.get(act, act)  # type: ignore[call-overload]
    expected = function(children[1](children[0](x)) + x)  # type: ignore[operator]
    torch.testing.assert_close(got, expected)
    dout = torch.randn_like(got)
    inputs = [x, *children[0].parameters(), *children[1].parameters()]
    inputs += list(act.parameters()) if isinstance(act, nn.Module) else []
    grads = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for out in (got, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_modules_own_slope_is_read() -> None:
    stage = StageModules(nn.Conv2d(4, 4, 1), None, nn.LeakyReLU(0.3))
    assert describe(BlockModules((stage,), skip="none"), "default")[1].stages[0].act == Activation("leaky_relu", 0.3)
