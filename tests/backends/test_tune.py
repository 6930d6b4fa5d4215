"""What `tune` measures and keeps, with a clock of the tests' own, and how backend "auto" follows it."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.blocks import block
from support.runs import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import resnet_fused
from resnet_fused import triton_kernels
from resnet_fused.backends import dispatch, how, measured, native
from resnet_fused.backends.measured import Decision
from resnet_fused.backends.tune import Run
from resnet_fused.errors import BackendError
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.ops import operators
from resnet_fused.params import BlockParams

if triton_kernels.why_not("cpu") is not None:
    pytest.skip("these tests need Triton's interpreter", allow_module_level=True)

import triton

from resnet_fused.triton_kernels.host import policies, tuning
from resnet_fused.triton_kernels.host.chips import CHIPS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and no interpreter in the way of "auto"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.forget()
    yield tmp_path / "resnet_fused" / "tuning.json"
    measured.forget()


def one_block(train: bool = True) -> nn.Module:
    model = resnet_fused.fuse(nn.Sequential(BasicBlock(6, 6))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train(train)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if x were on a GPU that has either backend's kernels: native's, which the CPU's stand for, have ways, too."""
    monkeypatch.setattr(native, "why_not_on_gpu", lambda device: None)
    kernels = dispatch.BACKENDS["native"]
    monkeypatch.setattr(type(kernels), "ways", lambda self, x, params, spec: how.ways(weights(params)))


def weights(params: BlockParams) -> list[Tensor]:
    return [p.weight for p in params.convs]


def declined(x: Tensor, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why "auto" would not take the Triton kernels, if they were not interpreted."""
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "interpreted", lambda: False)
        with torch.set_grad_enabled(model.training):
            return dispatch.BACKENDS["triton"].declines(x, *model[0].fused_describe()[:2])


def block_key(model: nn.Module, x: Tensor) -> measured.Key:
    params, spec, _ = model[0].fused_describe()
    return measured.key(spec, x, weights(params), spec.batch_stats)


X = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)


class Clock:
    """Runs the fastest contestant and PyTorch once and gives the times it was told: ours, the others', PyTorch's."""

    def __init__(self, fastest: int, ours: float, eager: float) -> None:
        self.fastest, self.ours, self.eager = fastest, ours, eager
        self.contestants = 0

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        runs[self.fastest]()
        runs[-1]()
        self.contestants = len(runs) - 1
        return [self.ours if i == self.fastest else 10.0 for i in range(len(runs) - 1)] + [self.eager]


@pytest.mark.parametrize("train", [True, False])
def test_auto_follows_what_was_measured(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_block(train)
    assert "tune" in (declined(X, model, monkeypatch) or "")

    result = resnet_fused.tune(model, X, timer=Clock(fastest=3, ours=0.5, eager=1.0))
    (row,) = result
    assert (row.backend, row.mode, row.library, row.speedup) == ("triton", "phased", "spatial", 2.0)
    assert row.workload == ("train" if train else "infer") and row.shape == tuple(X.shape)
    assert "triton" in str(result) and "phased" in str(result)
    assert declined(X, model, monkeypatch) is None
    assert declined(X[:1], model, monkeypatch) is not None, "another shape was not measured"
    params, spec, _ = model[0].fused_describe()
    policy = policies.choose(spec, X, weights(params), train)
    assert (policy.mode, policy.library) == ("phased", frozenset({0, 1}))


@pytest.mark.parametrize("train", [True, False])
def test_frozen_norms_are_measured_as_the_block_is_used(train: bool) -> None:
    model = one_block(train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    (row,) = resnet_fused.tune(model, X, timer=Clock(fastest=3, ours=0.5, eager=1.0))
    assert row.workload == ("train" if train else "infer")
    params, spec, _ = model[0].fused_describe()
    found = [measured.decision(measured.key(spec, X, weights(params), workload)) for workload in (True, False)]
    assert [decision is not None for decision in found] == [train, not train]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("train", [True, False])
def test_the_fastest_of_both_backends(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in two modes, each with the library's convolutions or without: all of this block's are spatial."""
    model = one_block(train)
    clock = Clock(fastest=1, ours=0.5, eager=1.0)
    (row,) = resnet_fused.tune(model, X, timer=clock)
    assert clock.contestants == 8
    assert (row.backend, row.mode, row.library, row.speedup) == ("native", "single", "spatial", 2.0)
    found = measured.decision(block_key(model, X))
    assert found == Decision("native", "single", "spatial", 2.0, {"triton": 0.1})
    workload = "training" if train else "evaluation"
    assert declined(X, model, monkeypatch) == (
        f"measured at 0.10, native at 2.00 times PyTorch's speed for {workload} with inputs (2, 6, 5, 4)"
    )
    params, spec, _ = model[0].fused_describe()
    assert policies.choose(spec, X, weights(params), train).library == frozenset(), (
        "the decision is the other backend's"
    )


@pytest.mark.usefixtures("both")
def test_one_backend_without_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_block()
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "why_not", lambda device=None: "Triton is not installed")
        clock = Clock(fastest=2, ours=0.5, eager=1.0)
        (row,) = resnet_fused.tune(model, X, tiles=True, timer=clock)
        assert (row.backend, clock.contestants) == ("native", 4)
    assert declined(X, model, monkeypatch) == (
        "not measured for training with inputs (2, 6, 5, 4), native at 2.00 times PyTorch's speed"
    )
    monkeypatch.setattr(type(dispatch.BACKENDS["native"]), "unsupported", lambda *_: "built without CUDA kernels")
    (row,) = resnet_fused.tune(model, X, timer=clock)
    assert (row.backend, clock.contestants) == ("triton", 4)


def test_auto_leaves_what_is_slower_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_block()
    resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=1.25, eager=1.0))
    assert "0.80 times" in (declined(X, model, monkeypatch) or "")


@pytest.mark.parametrize("train", [True, False])
def test_nothing_in_the_model_changes(train: bool) -> None:
    model = one_block(train)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    resnet_fused.tune(model, X, timer=lambda runs: [float(run() is None) for run in runs])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training == train and not any(m._forward_pre_hooks for m in model.modules())


def test_the_cache_survives_the_process_and_other_machines_do_not_see_it(cache: Path) -> None:
    model = one_block()
    resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=0.5, eager=1.0))
    everything = json.loads(cache.read_text())
    assert list(everything) == [measured.machine()]
    cache.write_text(json.dumps({"another machine": everything[measured.machine()]}))
    measured.forget()
    assert measured.decision(block_key(model, X)) is None


def test_a_machine_is_its_device_versions_and_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def other() -> str:
        measured.machine.cache_clear()
        measured._kernels.cache_clear()
        return measured.machine(gpu)

    gpu = None
    names = [other()]
    assert torch.__version__ in names[0]
    for target, name, value in (
        (operators, "binary", lambda: Path(__file__)),
        (operators, "binary", lambda: None),
        (triton, "__version__", "0.0"),
        (triton_kernels, "__file__", str(tmp_path / "__init__.py")),
    ):
        monkeypatch.setattr(target, name, value)
        names.append(other())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU of kind {gpu}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpu in (0, 1):  # noqa: B007 (`other` reads it)
        names.append(other())
    monkeypatch.setitem(sys.modules, "triton", None)
    names.append(other())
    assert len(set(names)) == len(names)
    measured.machine.cache_clear()
    measured._kernels.cache_clear()


def test_precision_of_float32_is_part_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_block()
    key = block_key(model, X)
    measured.record({key: Decision("triton", "single", "none", 2.0)}, {})
    monkeypatch.setattr(how, "precision", lambda: "ieee")
    assert measured.decision(key) is None


@pytest.mark.parametrize(
    "found",
    [
        {"mode": "single", "library": "none", "speedup": 2.0},  # before there were two backends
        {"backend": "native", "mode": "single", "library": "none", "speedup": 2.0, "others": {}, "later": 1},
        {"backend": "cutlass", "mode": "single", "library": "none", "speedup": 2.0, "others": {}},
        {"backend": "native", "mode": "single", "library": "none", "speedup": "fast", "others": {}},
        {"backend": "native", "mode": "single", "library": "none", "speedup": 2.0, "others": {"triton": None}},
        "phased",
        None,
    ],
)
def test_a_decision_of_another_form_counts_as_none(found: object, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_block()
    resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=0.5, eager=1.0))
    everything = json.loads(cache.read_text())
    blocks = everything[measured.machine()]["blocks"]
    blocks.update(dict.fromkeys(blocks, found))
    cache.write_text(json.dumps(everything))
    measured.forget()
    assert measured.decision(block_key(model, X)) is None
    assert "not measured" in (declined(X, model, monkeypatch) or "")


@pytest.mark.parametrize("section", [[], "", {"blocks": 3}, {"tiles": []}])
def test_a_section_of_another_form_counts_as_empty(section: object, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({measured.machine(): section}))
    measured.forget()
    model = one_block()
    assert measured.decision(block_key(model, X)) is None
    resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=0.5, eager=1.0))
    assert measured.decision(block_key(model, X)) is not None


def key_of(number: int) -> measured.Key:
    return (None, True, (number,), (2, 6, 5, 4), "torch.float32", (6, 6))


def test_processes_that_tune_at_the_same_time_keep_both_results(cache: Path) -> None:
    context, count = multiprocessing.get_context("fork"), 40
    together = context.Barrier(2)

    def tunes(first: int) -> None:
        together.wait()
        for number in range(first, first + count):
            measured.record({key_of(number): Decision("triton", "single", "none", 2.0)}, {})

    processes = [context.Process(target=tunes, args=(first,)) for first in (0, count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    measured.forget()
    missing = [number for number in range(2 * count) if measured.decision(key_of(number)) is None]
    assert missing == []
    assert {path.name for path in cache.parent.iterdir()} == {"tuning.json", "tuning.lock"}


def test_where_there_are_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, fcntl in enumerate((None, SimpleNamespace(LOCK_EX=2, flock=no_locks))):
        monkeypatch.setattr(measured, "fcntl", fcntl)
        measured.record({key_of(number): Decision("triton", "single", "none", 2.0)}, {})
    assert measured.decision(key_of(0)) is not None and measured.decision(key_of(1)) is not None


def no_locks(*_: object) -> None:
    raise OSError("no locks available")


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_broken_cache_counts_as_empty(content: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    measured.forget()
    model = one_block()
    resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=0.5, eager=1.0))
    assert measured.machine() in json.loads(cache.read_text())


def test_tiles_on_trial_compute_the_same() -> None:
    case = block(1, "identity", channels=6, size=(9, 8))
    x, params, spec = case.build(torch.float32, torch.channels_last)
    with how.launch_mode("phased"), how.library_convolutions("none"):
        with tuning.asked() as keys:
            expected = run(x, params, spec, "triton", case.upstream(torch.float32))
        assert {key[1] for key in keys} == {"convolution", "pointwise", "weight_gradient"}
        for key, tile in keys.items():
            for candidate in tuning.candidates(key[1], tile)[:1]:
                with tuning.trying(key, candidate):
                    got = run(x, params, spec, "triton", case.upstream(torch.float32))
                for name, t in got.items():
                    torch.testing.assert_close(t, expected[name], rtol=1e-4, atol=1e-4, msg=f"{key} {candidate} {name}")


def test_tune_keeps_the_fastest_tiles() -> None:
    """The clock calls the last candidate of every phase the fastest."""
    model = one_block(train=False)

    def last_wins(runs: Sequence[Run]) -> list[float]:
        return [float(len(runs) - i) for i in range(len(runs))]

    resnet_fused.tune(model, X, tiles=True, timer=last_wins)
    section = measured._section(None)["tiles"]
    assert section and all(set(tile) >= {"rows", "columns", "warps"} for tile in section.values())


def test_a_measured_tile_is_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another one nor a chip that kernels are only planned for takes it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU of kind {gpu}")
    measured.machine.cache_clear()
    planned = CHIPS["h100"]
    guessed = tuning.pointwise(planned, torch.float32, 64)
    faster = replace(guessed, warps=8)
    key = (1, "pointwise", "torch.float32", 64)
    measured.record({}, {key: asdict(faster)})
    assert tuning.pointwise(replace(planned, gpu=1), torch.float32, 64) == faster
    assert tuning.pointwise(replace(planned, gpu=0), torch.float32, 64) == guessed
    assert tuning.pointwise(planned, torch.float32, 64) == guessed
    measured.record({}, {key: {"rows": 8}})
    assert tuning.pointwise(replace(planned, gpu=1), torch.float32, 64) == guessed, "of another form, it counts as none"


def test_nothing_is_collected_where_nobody_asks() -> None:
    with tuning.asked() as outer:
        tuning.pointwise(CHIPS["h100"], torch.float32, 64)
        with tuning.asked() as inner:
            tuning.pointwise(CHIPS["h100"], torch.float32, 128)
    for channels in range(1, 100):
        tuning.pointwise(CHIPS["h100"], torch.float32, channels)
    assert len(outer) == 2 and len(inner) == 1 and not tuning._collecting


def test_blocks_are_timed_on_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    def timer(runs: Sequence[Run]) -> list[float]:
        assert [x.shape for x in current] == [X.shape]
        return [1.0] * len(runs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    resnet_fused.tune(one_block(), X, timer=timer)


def test_explain_with_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    model = one_block()
    (row,) = resnet_fused.explain(model, X)
    assert row.backend == "native" and "Residual blocks" in capsys.readouterr().out


@pytest.mark.usefixtures("no_interpreter")
def test_nothing_to_tune_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"nothing to tune: native: .* on cpu; triton: .* on cpu"):
        resnet_fused.tune(one_block(), X)


def test_shards_are_not_tuned(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(one_block().to(memory_format=torch.contiguous_format))  # all that fully_shard takes
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in (model[0][0], model):  # the root would stay gathered
            fully_shard(module, mesh=mesh)
        with pytest.raises(BackendError, match=r"parameters of 0\.0 are sharded: tune the model before fully_shard"):
            resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=0.5, eager=1.0))
    finally:
        torch.distributed.destroy_process_group()


def test_auto_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking a measurement up breaks no graph."""
    model = one_block()
    resnet_fused.tune(model, X, timer=Clock(fastest=0, ours=0.5, eager=1.0))
    params, spec, _ = model[0].fused_describe()
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)

    def chosen(x: Tensor) -> Tensor:
        return x + (dispatch.BACKENDS["triton"].declines(x, params, spec) is None)

    torch.testing.assert_close(torch.compile(chosen, backend="eager", fullgraph=True)(X), X + 1)
