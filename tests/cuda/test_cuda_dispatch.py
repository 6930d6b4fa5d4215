"""What the native backend says of CUDA tensors and tells its kernels, on fake tensors: no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks import Case, block
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused import explain, functional, fuse, triton_kernels
from resnet_fused.backends import dispatch, folding, how, measured, native
from resnet_fused.backends.how import How, Library, Mode, Wish
from resnet_fused.backends.measured import Decision
from resnet_fused.errors import BackendError
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.modules.plan import Described
from resnet_fused.ops import autograd, operators
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import Needs
from resnet_fused.spec.tensors import BlockTensors

if operators.load_error() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

Block = tuple[Tensor, BlockParams, BlockSpec]
BACKEND = dispatch.BACKENDS["native"]
CASE = block(3, "projection", channels=16, width=8, out_channels=32, size=(9, 8))


def forget() -> None:
    """What this process remembers of its devices."""
    measured.forget()
    for known in (measured.machine, native._known, triton_kernels._too_old):
        known.cache_clear()


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing measured, nothing remembered of the device, and no interpreter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    forget()
    with FakeTensorMode():
        yield
    forget()


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    archs: str = "80, 90 + PTX",
    cuda: str = "13.0",
) -> None:
    """A GPU, and an extension built for it."""
    info = operators.build_info() | {"cuda": cuda, "cuda architectures": archs}
    monkeypatch.setattr(operators, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def on(device: str, case: Case = CASE, dtype: torch.dtype = torch.bfloat16) -> Block:
    spec = case.spec
    convs = zip(spec.convs, case.sources, case.widths, case.kernels, strict=True)
    made = [torch.empty(k, c // stage.groups, *kernel, dtype=dtype, device=device) for stage, c, k, kernel in convs]
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        _, params, _ = replace(case, size=(5, 5), batch=2).build(dtype)
    params = map_tensors(params, lambda _, t: torch.empty(t.shape, dtype=t.dtype, device=device))
    assert [w.shape for w in made] == [p.weight.shape for p in params.convs]
    return torch.empty(case.batch, case.channels, *case.size, dtype=dtype, device=device), params, spec


def weights(params: BlockParams) -> list[Tensor]:
    return [p.weight for p in params.convs]


# --- why not ---------------------------------------------------------------------------------------------------------


def test_built_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda="no")
    reason = BACKEND.unsupported(*on("cuda"))
    assert "without CUDA kernels" in (reason or "") and "pip install --no-build-isolation -e ." in (reason or "")


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((9, 0), "80, 90 + PTX", None),
        ((8, 9), "80 + PTX", None),
        ((8, 0), "86 + PTX", r"built for the architectures 86 \+ PTX, this GPU is sm_80.*RESNET_FUSED_ARCHS=80"),
        ((9, 0), "80", "built for the architectures 80, this GPU is sm_90"),
        ((12, 0), "80, 90 + PTX", None),
        ((10, 3), "80, 100 + PTX", None),
        ((10, 0), "80, 120 + PTX", "this GPU is sm_100"),
        ((7, 5), "80 + PTX", "need sm_80 or newer, this GPU is sm_75"),
    ],
)
def test_architectures(
    capability: tuple[int, int], archs: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, archs)
    reason = BACKEND.unsupported(*on("cuda"))
    assert reason is None if expected is None else re.search(expected, reason or "")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"size": (16381, 2)}, None),  # a row of padding on either side
        ({"size": (2, 16382)}, "up to 16383 rows and columns with their padding"),
        ({"size": (4096, 4096)}, None),  # 2^24 pixels of 32 channels
        ({"size": (4096, 4097)}, "2\\^29 values per image"),
        ({"size": (1024, 1024), "batch": 1024}, None),
        ({"size": (1024, 1024), "batch": 1025}, "2\\^30 pixels per batch"),
    ],
    ids=str,
)
def test_sizes(change: dict[str, Any], expected: str | None) -> None:
    reason = BACKEND.unsupported(*on("cuda", replace(CASE, **change)))
    if expected is None:
        assert reason is None
    else:
        assert reason is not None
        with pytest.raises(BackendError, match=expected):
            dispatch.select("native", *on("cuda", replace(CASE, **change)))


@pytest.mark.usefixtures("gpu")
def test_dtypes_and_devices() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert BACKEND.unsupported(*on("cuda", dtype=dtype)) is None
    assert "float64" in (BACKEND.unsupported(*on("cuda", dtype=torch.float64)) or "")
    assert "x is on meta" in (BACKEND.unsupported(*on("meta")) or "")
    assert BACKEND.unsupported(*on("cpu", dtype=torch.float64)) is None


@pytest.mark.usefixtures("gpu")
def test_pooling_is_for_cpu_tensors() -> None:
    with pytest.raises(BackendError, match="pools CPU tensors, x is on cuda"):
        functional.max_pool2d(torch.empty(1, 4, 8, 8, device="cuda"), 3, 2, 1, backend="native")


@pytest.mark.usefixtures("gpu")
def test_a_batch_norm_on_its_own() -> None:
    assert dispatch.select_norm("auto", torch.empty(1, 8, 2, 2, device="cuda")) is BACKEND
    assert dispatch.select_norm("auto", torch.empty(1, 8, 2, 2, device="cuda", dtype=torch.float64)) is None


def test_a_batch_norm_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda="no")
    assert dispatch.select_norm("auto", torch.empty(1, 8, 2, 2, device="cuda")) is None


# --- what auto takes -------------------------------------------------------------------------------------------------


def decide(given: Block, decision: Decision, train: bool = True) -> None:
    x, params, spec = given
    measured.record({measured.key(spec, x, weights(params), train): decision}, {})


@pytest.mark.usefixtures("gpu")
def test_auto_leaves_the_gpu_to_pytorch_until_measured() -> None:
    assert dispatch.select("auto", *on("cuda")) is None
    reasons = dispatch.reasons("auto", *on("cuda"))
    assert all("resnet_fused.tune(model, x) measures" in (reason or "") for reason in reasons.values())
    assert dispatch.select("native", *on("cuda")) is BACKEND
    assert dispatch.select("auto", *on("cpu")) is BACKEND, "on a CPU nothing is measured"


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_fastest() -> None:
    given = on("cuda")
    decide(given, Decision("native", "phased", "spatial", 1.5, {"triton": 1.25}))
    assert dispatch.reasons("auto", *given) == {
        "native": None,
        "triton": "measured at 1.25, native at 1.50 times PyTorch's speed for training with inputs (2, 16, 9, 8)",
    }
    assert dispatch.select("auto", *given) is BACKEND
    decide(given, Decision("triton", "phased", "spatial", 1.5, {"native": 1.25}))
    assert dispatch.select("auto", *given) is dispatch.BACKENDS["triton"]
    assert "measured at 1.25, triton at 1.50" in (BACKEND.declines(*given) or "")
    decide(given, Decision("native", "phased", "spatial", 0.75, {"triton": 0.5}))
    assert dispatch.select("auto", *given) is None
    assert BACKEND.declines(*given) == "measured at 0.75 times PyTorch's speed for training with inputs (2, 16, 9, 8)"
    other = on("cuda", replace(CASE, batch=3))
    assert "not measured on this GPU for training with inputs (3, 16, 9, 8)" in (BACKEND.declines(*other) or "")


@pytest.mark.usefixtures("gpu")
def test_two_gpus_do_not_answer_for_each_other(told: dict[str, How], monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is cuda:0 throughout."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: f"GPU of kind {device}")
    decide(on("cuda:1"), Decision("native", "phased", "all", 1.5))
    assert dispatch.select("auto", *on("cuda:1")) is BACKEND
    assert dispatch.select("auto", *on("cuda:0")) is None
    assert "not measured on this GPU" in (BACKEND.declines(*on("cuda:0")) or "")
    for device, expected in (("cuda:1", way("phased", "all")), ("cuda:0", way())):
        x, params, spec = on(device)
        BACKEND.forward(spec, autograd.tensors_of(params, x), BlockTensors.filled(False, 4))
        assert told == {"forward": expected}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "one kind of GPU")
    forget()
    decide(on("cuda:1"), Decision("native", "phased", "all", 1.5))
    assert dispatch.select("auto", *on("cuda:0")) is BACKEND, "what one was measured at holds for all of its kind"


def test_the_gpu_of_x_is_asked_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=0: (9, 0) if str(device)[-1] == "1" else (7, 5)
    )
    for backend in dispatch.BACKENDS.values():
        assert backend.unavailable() is None
        assert backend.unsupported(*on("cuda:1")) is None
        assert re.search(r"sm_75|\(7, 5\)", backend.unsupported(*on("cuda:0")) or "")
    assert "(7, 5)" in (triton_kernels.why_not("cuda") or ""), "without an index it is the current device"


@pytest.mark.usefixtures("gpu")
def test_frozen_norms_in_training_do_not_follow_the_evaluation() -> None:
    stages = tuple(replace(stage, batch_stats=False) for stage in CASE.spec.convs)
    x, params, spec = on("cuda", replace(CASE, spec=replace(CASE.spec, stages=stages[:-1], projection=stages[-1])))
    params = map_tensors(params, lambda _, t: t.requires_grad_() if t.is_floating_point() else t)
    decide((x, params, spec), Decision("native", "phased", "all", 1.5), train=False)
    assert "not measured on this GPU for training" in (BACKEND.declines(x, params, spec) or "")
    with torch.no_grad():
        assert BACKEND.declines(x, params, spec) is None
    decide((x, params, spec), Decision("triton", "phased", "all", 1.5), train=True)
    assert dispatch.select("auto", x, params, spec) is dispatch.BACKENDS["triton"]
    with torch.no_grad():
        assert dispatch.select("auto", x, params, spec) is BACKEND
    detached = map_tensors(params, lambda _, t: t.detach())
    assert BACKEND.declines(x, detached, spec) is None
    assert "triton at 1.50" in (BACKEND.declines(x.requires_grad_(), detached, spec) or ""), "x's gradient is one, too"


@pytest.mark.usefixtures("gpu")
def test_explain_names_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(BasicBlock(8, 8))
    monkeypatch.setattr(type(model), "fused_describe", lambda self: Described(*on("cuda")[1:], None))
    (row,) = explain(model)
    assert row.backend == "eager"
    assert row.reason.startswith("native: not measured on this GPU; resnet_fused.tune(model, x) measures; triton: ")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_explain_names_the_precision_of_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(how, "precision", lambda: precision)
    model = fuse(BasicBlock(8, 8), backend="native")
    for dtype, note in (
        (torch.float32, f"; float32 products in {precision}, as PyTorch's convolutions"),
        (torch.half, ""),
    ):
        monkeypatch.setattr(
            type(model), "fused_describe", lambda self, dtype=dtype: Described(*on("cuda", dtype=dtype)[1:], None)
        )
        assert explain(model)[0].reason == f"asked for by name{note}"


@pytest.mark.usefixtures("gpu")
def test_ways_on_a_gpu() -> None:
    """Convolutions that have no kernel are the library's in any case."""

    def count(case: Case) -> int:
        return len(BACKEND.ways(*on("cuda", case)))

    assert count(block(2, channels=16, width=16)) == 4
    assert count(CASE) == 6
    assert count(block(2, channels=16, width=16, groups=2)) == 2
    assert count(block(2, channels=16, width=12)) == 2
    assert BACKEND.ways(*on("cpu")) == []


# --- what the kernels are told ---------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, How]:
    """How each operator was asked to run; none does."""
    seen: dict[str, How] = {}

    def forward(spec: BlockSpec, tensors: operators.Tensors, needs: Needs, how: How) -> Any:
        seen["forward"] = how
        return tensors.x, [], []

    def backward(*_: Any, how: How, master: torch.dtype | None) -> Any:
        seen["backward"] = how
        return []

    def infer(x: Tensor, *_: Any, how: How, residual: Tensor | None) -> Any:
        seen["infer"] = how
        return x

    for stub in (forward, backward, infer):
        monkeypatch.setattr(operators, f"residual_block_{stub.__name__}", stub)
    empty = folding.FoldedBlock([], [], None, None, None, False, True)
    monkeypatch.setattr(folding, "folded", lambda params, x, spec: replace(empty, weights=weights(params)))
    return seen


def way(mode: Mode | None = None, library: Library | None = None, tf32: bool = True) -> How:
    """What was wished for, and tf32 as PyTorch's convolutions, where nothing was set."""
    x, params, spec = on("cuda")
    return how.choose(Wish(mode, library), spec, x, weights(params))._replace(tf32=tf32)


def call(given: Block) -> None:
    x, params, spec = given
    tensors = autograd.tensors_of(params, x)
    needs = BlockTensors.filled(False, len(spec.convs))
    BACKEND.forward(spec, tensors, needs)
    BACKEND.backward(spec, x, None, [], [], tensors, needs)
    BACKEND.infer(x, params, spec)


@pytest.mark.usefixtures("gpu")
def test_every_direction_is_told_the_same(told: dict[str, How], monkeypatch: pytest.MonkeyPatch) -> None:
    def assert_told(device: str, expected: How) -> None:
        told.clear()
        call(on(device))
        assert told == dict.fromkeys(("forward", "backward", "infer"), expected)

    assert_told("cuda", way())
    for train in (True, False):
        decide(on("cuda"), Decision("triton", "phased", "all", 1.5), train)
    assert_told("cuda", way())
    for train in (True, False):
        decide(on("cuda"), Decision("native", "phased", "all", 1.5), train)
    assert_told("cuda", way("phased", "all"))
    with how.launch_mode("single"):
        assert_told("cuda", way("single", "all"))
        with how.library_convolutions("none"):
            assert_told("cuda", way("single", "none"))
            assert_told("cpu", how.CHOSEN)
    monkeypatch.setattr(how, "precision", lambda: "ieee")
    assert_told("cuda", way("phased", "all", tf32=False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_graphs_hold_what_was_measured(dynamic: bool, told: dict[str, How], monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces the choice without a break, with and without measurements."""
    monkeypatch.setattr(native, "why_not_on_gpu", lambda device: None)
    x, params, spec = given = on("cuda")

    def run(x: Tensor) -> Tensor | None:
        chosen = dispatch.select("auto", x, params, spec)
        if chosen is None:
            return None
        tensors = autograd.tensors_of(params, x)
        return chosen.forward(spec, tensors, BlockTensors.filled(False, len(spec.convs)))[0]

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=dynamic)
    torch.compiler.reset()
    assert compiled(x) is None
    decide(given, Decision("native", "phased", "none", 1.5))
    torch.compiler.reset()
    assert compiled(x) is not None
    assert told == {"forward": way("phased", "none")}
    assert compiled(torch.cat([x, x])) is None, "another shape was not measured"


@pytest.mark.parametrize("dynamic", [False, True])
def test_triton_is_asked_without_a_break(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "why_not", lambda device=None: None)
    x, params, spec = given = on("cuda")
    decide(given, Decision("triton", "phased", "none", 1.5))

    def run(x: Tensor) -> Tensor | None:
        return x if dispatch.select("auto", x, params, spec) is dispatch.BACKENDS["triton"] else None

    torch.compiler.reset()
    assert torch.compile(run, backend="eager", fullgraph=True, dynamic=dynamic)(x) is not None
