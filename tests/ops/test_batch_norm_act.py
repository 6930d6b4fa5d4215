"""batch_norm_act against act(bn(x) + residual) with PyTorch's own modules; tolerance: tests/support/equivalence.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.batch_norm_act import Case, check, run
from support.equivalence import assert_as_accurate
from support.matrix import BACKENDS, FORMATS, LOW_PRECISION, family
from support.shared_batch import WORLD, Shared, compute, results
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused import functional
from resnet_fused.backends import dispatch
from resnet_fused.errors import BackendError
from resnet_fused.ops import norm_operators
from resnet_fused.spec.activations import KINDS
from resnet_fused.tools.saved_bytes import saved_bytes

backends = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["eager", *BACKENDS])
dtypes = pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
residuals = pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
acts = pytest.mark.parametrize("act", ["relu", "identity"])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


# --- values and gradients --------------------------------------------------------------------------------------------


@backends
@dtypes
@formats
@modes
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 17])
def test_as_accurate_as_eager(
    channels: int, training: bool, memory_format: torch.memory_format, dtype: torch.dtype, backend: str
) -> None:
    check(Case(channels, training=training), dtype, backend, memory_format)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    case = Case(
        draw(st.integers(1, 40)),
        (draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        draw(st.integers(1, 4)),
        draw(st.booleans()),
        draw(st.sampled_from(["relu", "identity"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0.1, 1.0, 0.0, None])),
        draw(st.sampled_from([1e-5, 1e-3])),
    )
    values = case.batch * case.size[0] * case.size[1]
    return case if values >= 16 else replace(case, batch=16)


@backends
@given(
    case=cases(),
    last=st.booleans(),
    dtype=st.sampled_from(LOW_PRECISION),
    float_norm=st.booleans(),
)
@settings(family, max_examples=80)
def test_family(case: Case, last: bool, dtype: torch.dtype, float_norm: bool, backend: str) -> None:
    # a channel's bfloat16 values are added up in float32 one after another: some 6 ulp where PyTorch has 1, and of one
    # or two channels the error is no average
    assume(case.channels > 2 or dtype != torch.bfloat16 or not float_norm)
    check(case, dtype, backend, FORMATS[last], torch.float32 if float_norm else None)


@backends
@given(case=cases(), last=st.booleans())
@settings(family, max_examples=80)
def test_family_in_double(case: Case, last: bool, backend: str) -> None:
    given_tensors = case.build(memory_format=FORMATS[last])
    expected = run(*given_tensors, case.act, "eager")
    torch.testing.assert_close(run(*given_tensors, case.act, backend), expected, rtol=1e-10, atol=1e-11)


@backends
@formats
@modes
@residuals
@pytest.mark.parametrize("act", [name for name, kind in KINDS.items() if not kind.learned])
def test_every_activation(
    act: str, residual: bool, training: bool, memory_format: torch.memory_format, backend: str
) -> None:
    """In fp64; 1e-7, since PyTorch has hardsigmoid's sixth in float32. The result has x's memory format."""
    x, skip, bn, dout = Case(7, residual=residual, act=act, training=training).build(memory_format=memory_format)
    expected = run(x, skip, bn, dout, act, "eager")
    torch.testing.assert_close(run(x, skip, bn, dout, act, backend), expected, rtol=1e-7, atol=1e-7)
    out = functional.batch_norm_act(x, bn, residual=skip, act=act, backend=backend)
    assert out.is_contiguous(memory_format=memory_format)


@backends
@dtypes
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_smooth_activations_are_as_accurate_as_eagers(act: str, dtype: torch.dtype, backend: str) -> None:
    check(Case(8, act=act), dtype, backend)


@backends
@formats
@pytest.mark.usefixtures("two_threads")
def test_many_chunks(memory_format: torch.memory_format, backend: str) -> None:
    """More rows than one thread takes at a time, with a mean that would cancel."""
    check(Case(40, (29, 31), 4, mean=100.0), torch.float32, backend, memory_format)


@backends
@residuals
@acts
@modes
@pytest.mark.parametrize("affine", [True, False])
def test_gradient_check(affine: bool, training: bool, act: str, residual: bool, backend: str) -> None:
    x, skip, bn, _ = Case(3, (3, 2), 2, residual, act, training, affine).build()
    wanted = [t.requires_grad_() for t in (x, skip, *bn.parameters()) if t is not None]
    frozen = copy.deepcopy(bn)

    def compute_(*tensors: Tensor) -> Tensor:
        module = copy.deepcopy(frozen)
        if affine:
            del module.weight, module.bias
            module.weight, module.bias = tensors[-2:]  # type: ignore[assignment]
        return functional.batch_norm_act(
            tensors[0],
            module,
            residual=tensors[1] if residual else None,
            act=act,  # type: ignore[arg-type]
            backend=backend,
        )

    assert torch.autograd.gradcheck(compute_, wanted)


@backends
@modes
@acts
def test_only_the_wanted_gradients(act: str, training: bool, backend: str) -> None:
    """Every subset of x, residual, weight and bias: the same bits as when all are wanted."""
    x, residual, bn, dout = Case(training=training).build(torch.float32, torch.channels_last)
    everything = run(x, residual, bn, dout, act, backend)
    names = ["x", "residual", "weight", "bias"]
    for wanted in product([True, False], repeat=4):
        module = copy.deepcopy(bn)
        leaves = dict(
            zip(names, (x.detach(), residual.detach(), module.weight, module.bias), strict=True)  # type: ignore[union-attr]
        )
        for name, want in zip(names, wanted, strict=True):
            leaves[name].requires_grad_(want)
        out = functional.batch_norm_act(
            leaves["x"],
            module,
            residual=leaves["residual"],
            act=act,  # type: ignore[arg-type]
            backend=backend,
        )
        assert torch.equal(out, everything["out"])  # type: ignore[arg-type]
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(dout)
        for name, want in zip(names, wanted, strict=True):
            grad = leaves[name].grad
            assert torch.equal(grad, everything[f"grad of {name}"]) if want else grad is None, name  # type: ignore[arg-type]
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, everything[name]), name  # type: ignore[arg-type]


@backends
@formats
@pytest.mark.parametrize("arrangement", ["sliced", "transposed", "expanded"])
def test_strided(arrangement: str, memory_format: torch.memory_format, backend: str) -> None:
    """x, residual and the gradient from above as windows of wider tensors: the bits of their dense copies."""
    x, residual, bn, dout = Case(6, (7, 7)).build(torch.float32, memory_format)
    assert residual is not None

    def strided(t: Tensor) -> Tensor:
        if arrangement == "expanded":
            return t[:, :, :1, :1].expand(t.shape)
        if arrangement == "transposed":
            return t.transpose(2, 3)
        wide = torch.full((3, 9, 7, 9), torch.nan).contiguous(memory_format=memory_format)
        wide[:, 2:8, :, 1:8] = t
        return wide[:, 2:8, :, 1:8]

    tensors = [strided(t) for t in (x, residual, dout)]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    got = run(tensors[0], tensors[1], bn, tensors[2], backend=backend)
    expected = run(dense[0], dense[1], bn, dense[2], backend=backend)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name  # type: ignore[arg-type]


@backends
@formats
@dtypes
def test_memory_format_of_the_output(dtype: torch.dtype, memory_format: torch.memory_format, backend: str) -> None:
    x, residual, bn, _ = Case(8).build(dtype, memory_format)
    other = None if residual is None else residual.contiguous(memory_format=FORMATS[memory_format == FORMATS[0]])
    for skip in (None, residual, other):
        out = functional.batch_norm_act(x, bn, residual=skip, backend=backend)
        assert out.is_contiguous(memory_format=memory_format) and out.dtype == dtype


# --- what is not finite, what is not written -------------------------------------------------------------------------


@backends
@modes
@acts
@pytest.mark.parametrize("place", ["x", "residual"])
def test_nan_and_infinity(place: str, act: str, training: bool, backend: str) -> None:
    """They reach what they reach in PyTorch; ReLU passes NaN, and the gradient at it."""
    x, residual, bn, dout = Case(9, training=training).build(torch.float32, torch.channels_last)
    given_tensors = {"x": x, "residual": residual}
    given_tensors[place][0, 2, 3, 4] = torch.nan  # type: ignore[index]
    given_tensors[place][1, 8, 1, 1] = torch.inf  # type: ignore[index]
    given_tensors[place][2, 5, 1, 1] = -torch.inf  # type: ignore[index]
    got, eager = (run(x, residual, bn, dout, act, b) for b in (backend, "eager"))
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    assert got["out"].isnan().any()  # type: ignore[union-attr]


@backends
@dtypes
@formats
@pytest.mark.parametrize("channels", [3, 8, 17])
def test_reads_nothing_that_was_not_written(
    channels: int, memory_format: torch.memory_format, dtype: torch.dtype, backend: str
) -> None:
    """Fresh memory is NaN here, and 255 in bytes; a value read before it is written would show."""
    case = Case(channels)
    given_tensors = case.build(dtype, memory_format)
    expected = run(*given_tensors, backend=backend)
    torch.use_deterministic_algorithms(True)  # which is when torch fills uninitialised memory
    try:
        assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.uint8) == 255
        got = run(*given_tensors, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name  # type: ignore[arg-type]


@backends
@pytest.mark.parametrize("threads", [1, 2])
@dtypes
def test_bitwise_repeatable(dtype: torch.dtype, threads: int, backend: str) -> None:
    given_tensors = Case(24, (33, 29)).build(dtype, torch.channels_last)
    expected = run(*given_tensors, backend=backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for got in (run(*given_tensors, backend=backend) for _ in range(3)):
            assert all(torch.equal(t, expected[name]) for name, t in got.items())  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


@backends
@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("channels", [8, 17])
def test_keeps_x_and_one_bit_an_output(channels: int, act: str, backend: str) -> None:
    case = Case(channels, (6, 7), act=act)
    x, residual, bn, _ = case.build(torch.float32, torch.channels_last)
    x = x.requires_grad_() * 1  # a leaf would not count
    residual = residual.requires_grad_() * 1  # type: ignore[union-attr]

    def compute_() -> Tensor:
        return functional.batch_norm_act(x, bn, residual=residual, act=act, backend=backend)  # type: ignore[arg-type]

    mask = (3 * 6 * 7 * ((channels + 7) // 8)) if act == "relu" else 0
    assert saved_bytes(compute_, bn.buffers()) == x.nbytes + mask + 2 * 4 * channels  # and the batch's statistics
    bn.eval().requires_grad_(False)
    assert saved_bytes(compute_, [*bn.buffers(), *bn.parameters()]) == mask  # dx = scale * dz


# --- running statistics ----------------------------------------------------------------------------------------------


def without_buffers(bn: nn.BatchNorm2d) -> None:
    bn.running_mean = bn.running_var = bn.num_batches_tracked = None


STATES: dict[str, tuple[dict, Callable[[nn.BatchNorm2d], object]]] = {
    "plain": ({}, lambda bn: None),
    "cumulative": ({"momentum": None}, lambda bn: None),
    "momentum 1": ({"momentum": 1.0}, lambda bn: None),
    "momentum 0": ({"momentum": 0.0}, lambda bn: None),
    "evaluation": ({}, lambda bn: bn.eval()),
    "not tracking": ({"track_running_stats": False}, lambda bn: None),
    "not tracking, evaluation": ({"track_running_stats": False}, lambda bn: bn.eval()),
    "tracking switched off": ({}, lambda bn: setattr(bn, "track_running_stats", False)),
    "tracking switched off, evaluation": ({}, lambda bn: (setattr(bn, "track_running_stats", False), bn.eval())),
    "without buffers": ({}, without_buffers),
    "without buffers, evaluation": ({}, lambda bn: (without_buffers(bn), bn.eval())),
    "without counter": ({"momentum": None}, lambda bn: setattr(bn, "num_batches_tracked", None)),
}


@every_backend
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("state", STATES)
def test_behaves_as_the_module(state: str, kind: type[nn.BatchNorm2d], backend: str) -> None:
    """Output, buffers and counter over three batches, as the module's own forward leaves them."""
    arguments, change = STATES[state]
    if kind is nn.SyncBatchNorm and state in ("without buffers", "without counter"):
        pytest.skip("nn.SyncBatchNorm asserts that there is a counter")
    bn = kind(5, **arguments).double()
    change(bn)
    theirs = copy.deepcopy(bn)
    x, residual, _, _ = Case().build()
    for step in range(3):
        batch = x * (step + 1) - step
        out = functional.batch_norm_act(batch, bn, residual=residual, backend=backend)
        torch.testing.assert_close(out, torch.relu(theirs(batch) + residual))
    torch.testing.assert_close(dict(bn.named_buffers()), dict(theirs.named_buffers()))


@every_backend
def test_two_values_per_channel(backend: str) -> None:
    """The unbiased variance is twice the biased one there, the largest difference that the two can have."""
    bn = nn.BatchNorm2d(3, momentum=1.0).double()
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    functional.batch_norm_act(x, bn, backend=backend)
    torch.testing.assert_close(bn.running_var, x.var((0, 2, 3)))


# --- other calls -----------------------------------------------------------------------------------------------------


@backends
@modes
def test_autocast_leaves_the_dtypes(training: bool, backend: str) -> None:
    """As in eager, the norm runs in x's dtype with its parameters in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        x, residual, bn, dout = Case(training=training).build(dtype, norm_dtype=torch.float32)
        plain = run(x, residual, bn, dout, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            eager, got = (run(x, residual, bn, dout, backend=b) for b in ("eager", backend))
        for name, value in eager.items():
            assert got[name].dtype == value.dtype, name  # type: ignore[union-attr]
            assert torch.equal(got[name], plain[name]), name  # type: ignore[arg-type]


def test_a_wider_residual_runs_in_pytorch() -> None:
    """bfloat16 + float32 is float32 there."""
    x, _, bn, _ = Case().build(torch.bfloat16, norm_dtype=torch.float32)
    residual = torch.randn(x.shape)
    expected = torch.relu(copy.deepcopy(bn)(x) + residual)
    out = functional.batch_norm_act(x, copy.deepcopy(bn), residual=residual)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    with pytest.raises(BackendError, match=r"x is torch.bfloat16, residual is torch.float32.*'auto', 'eager'"):
        functional.batch_norm_act(x, bn, residual=residual, backend="native")


def test_hooks_run() -> None:
    """Where the module has any, it is called."""
    x, _, bn, _ = Case().build()
    seen: list[nn.Module] = []
    bn.register_forward_hook(lambda module, args, out: seen.append(module))
    functional.batch_norm_act(x, bn)
    assert seen == [bn]
    with pytest.raises(BackendError, match=r"bn \(BatchNorm2d\) has hooks"):
        functional.batch_norm_act(x, bn, backend="native")


@backends
@modes
@acts
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool, act: str, training: bool, backend: str) -> None:
    """Values, gradients and buffers of the graph, which holds the operators."""
    torch._dynamo.reset()
    _, _, bn, _ = Case(training=training).build(torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def compute_(x: Tensor, residual: Tensor, bn: nn.Module) -> Tensor:
        return functional.batch_norm_act(x, bn, residual=residual, act=act, backend=backend)  # type: ignore[arg-type]

    torch.compile(compute_, backend=keep, fullgraph=True)(*Case().build(torch.float32)[:2], copy.deepcopy(bn))
    nodes = [node for m in graphs[0].modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes]
    assert any("resnet_fused.normalize_act" in str(node.target) for node in nodes)
    compiled = torch.compile(compute_, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x, residual, _, dout = Case(batch=batch).build(torch.float32, torch.channels_last)
        ours, expected = ([t.detach().requires_grad_() for t in (x, residual)] for _ in range(2))  # type: ignore[union-attr]
        theirs = copy.deepcopy(bn)
        bn.zero_grad(), theirs.zero_grad()
        compiled(*ours, bn).backward(dout)
        compute_(*expected, theirs).backward(dout)
        for got, value in zip([*ours, *bn.parameters()], [*expected, *theirs.parameters()], strict=True):
            assert torch.equal(got.grad, value.grad)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(bn.buffers(), theirs.buffers(), strict=True))


@backends
@modes
@acts
def test_second_derivative_says_what_to_do(act: str, training: bool, backend: str) -> None:
    x, residual, bn, _ = Case(training=training).build()
    out = functional.batch_norm_act(x.requires_grad_(), bn, residual=residual, act=act, backend=backend)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative of batch_norm_act.*backend='eager'"):
        torch.autograd.grad(grad.sum(), x)


@backends
def test_no_graph_without_gradient(backend: str) -> None:
    x, residual, bn, _ = Case().build()
    bn.requires_grad_(False)
    assert functional.batch_norm_act(x, bn, residual=residual, backend=backend).grad_fn is None
    with torch.no_grad():
        assert functional.batch_norm_act(x.requires_grad_(), bn, backend=backend).grad_fn is None


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_empty_batch(backend: str) -> None:
    bn, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(0, 3, 6, 6)
    assert torch.equal(functional.batch_norm_act(x, bn, backend=backend), torch.relu(theirs(x)))
    for ours, expected in zip(bn.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


# --- bad calls -------------------------------------------------------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    pass


X = torch.randn(2, 3, 4, 4)
HALF = nn.BatchNorm2d(3).half()
EPS = nn.BatchNorm2d(3, eps=0.0)
ONE_BUFFER = nn.BatchNorm2d(3)
ONE_BUFFER.running_var = None


@pytest.mark.parametrize("backend", ["auto", "eager", *BACKENDS])
@pytest.mark.parametrize(
    ("x", "bn", "options", "error", "words"),
    [
        (X[0], nn.BatchNorm2d(3), {}, ValueError, r"4-d.*3-d"),
        (X.long(), nn.BatchNorm2d(3), {}, TypeError, r"int64.*float32"),
        ([X], nn.BatchNorm2d(3), {}, TypeError, r"must be a tensor, got list"),
        (X, nn.BatchNorm2d(4), {}, ValueError, r"\(2, 3, 4, 4\) has 3 channels, bn takes 4"),
        (X, HALF, {}, TypeError, r"bn.weight is torch.float16.*accepted: torch.float32"),
        (X.half(), nn.BatchNorm2d(3).double(), {}, TypeError, r"float64.*accepted: torch.float16, torch.float32"),
        (X, nn.BatchNorm2d(3, device="meta"), {}, ValueError, r"x is on cpu but bn.weight is on meta"),
        (X, EPS, {}, ValueError, r"bn.eps is 0.0.*in training > 0"),
        (X, nn.BatchNorm2d(3, eps=-1.0).eval(), {}, ValueError, r"bn.eps is -1.0"),
        (X, ONE_BUFFER, {}, ValueError, r"only one of running_mean and running_var"),
        (X, copy.deepcopy(ONE_BUFFER).eval(), {}, ValueError, r"only one of running_mean and running_var"),
        (X[:1, :, :1, :1], nn.BatchNorm2d(3), {}, ValueError, r"more than 1 value per channel.*\[1, 3, 1, 1\]"),
        (X, nn.BatchNorm2d(3), {"act": "mish"}, ValueError, r"act must be one of .*'relu'.*, got 'mish'"),
        (X, nn.BatchNorm2d(3), {"act": "prelu"}, ValueError, r"act is 'prelu', whose slope is learned"),
        (X, nn.BatchNorm2d(3), {"residual": X[:1]}, ValueError, r"\(1, 3, 4, 4\), x is \(2, 3, 4, 4\)"),
        (X, nn.BatchNorm2d(3), {"residual": X.long()}, TypeError, r"residual is torch.int64"),
        (X, nn.BatchNorm2d(3), {"residual": 1.0}, TypeError, r"a tensor or None, got float"),
        (X, nn.BatchNorm2d(3), {"residual": X.to("meta")}, ValueError, r"x is on cpu but residual is on meta"),
        (X, OwnNorm(3), {}, TypeError, r"OwnNorm; accepted: nn.BatchNorm2d and nn.SyncBatchNorm"),
        (X, nn.BatchNorm3d(3), {}, TypeError, r"BatchNorm3d; accepted"),
        (X, nn.LazyBatchNorm2d(), {}, TypeError, r"LazyBatchNorm2d; accepted"),
        (X, nn.InstanceNorm2d(3, track_running_stats=True), {}, TypeError, r"InstanceNorm2d; accepted"),
        (X, None, {}, TypeError, r"NoneType; accepted"),
    ],
)
def test_bad_calls_change_nothing(
    x: Tensor, bn: nn.Module, options: dict, error: type[Exception], words: str, backend: str
) -> None:
    buffers = {n: t.clone() for n, t in bn.named_buffers()} if isinstance(bn, nn.BatchNorm2d) else {}
    with pytest.raises(error, match=words):
        functional.batch_norm_act(x, bn, **options, backend=backend)
    for name, before in buffers.items():
        if before.device.type == "cpu":
            assert torch.equal(bn.get_buffer(name), before), name


def test_failing_kernels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics move after everything has succeeded."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    x, _, bn, _ = Case().build(torch.float32)
    before = copy.deepcopy(bn.state_dict())
    monkeypatch.setattr(norm_operators, "normalize_act", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        functional.batch_norm_act(x, bn, backend="native")
    assert all(torch.equal(t, before[name]) for name, t in bn.state_dict().items())


def test_backend_that_cannot() -> None:
    bn = nn.BatchNorm2d(3)
    with pytest.raises(BackendError, match=r"triton.*'auto', 'eager'"):
        functional.batch_norm_act(X, bn, backend="triton")
    with pytest.raises(ValueError, match=r"'nothing'.*'native'"):
        functional.batch_norm_act(X, bn, backend="nothing")
    with pytest.raises(BackendError, match=r"run on CUDA tensors, x is on meta"):  # no silent fallback
        functional.batch_norm_act(X.to("meta"), bn.to("meta"), backend="native")
    assert dispatch.select_norm("auto", X.to("meta")) is None


# --- the operators ---------------------------------------------------------------------------------------------------


def operator(name: str) -> Callable:
    return getattr(torch.ops.resnet_fused, name).default


OPERATORS = [
    "batch_statistics",
    "normalize_act",
    "normalize_act_backward_reduce",
    "normalize_act_backward_apply",
]


def arguments(
    name: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    saves: bool = True,
    change: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple:
    """A call of the operator; saves: what it can give beside its first result."""
    x, residual, bn, dout = case.build(dtype, memory_format)
    x, dout = change(x), change(dout)
    relu = case.act == "relu"
    weight, bias = (None if t is None else t.detach() for t in (bn.weight, bn.bias))
    mean, var = operator("batch_statistics")(x)
    forward = (
        x,
        mean,
        var,
        weight,
        bias,
        None if residual is None else change(residual),
        case.eps,
        relu,
        saves and relu,
    )
    mask = operator("normalize_act")(*forward)[1] if saves and relu else None
    sums = operator("normalize_act_backward_reduce")(dout, mask, x, mean) if case.training else None
    return {
        "batch_statistics": (x,),
        "normalize_act": forward,
        "normalize_act_backward_reduce": (dout, mask, x, mean),
        "normalize_act_backward_apply": (dout, mask, x, mean, var, weight, sums, 90.0, case.eps, saves),
    }[name]


@formats
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(), Case(8, training=False, affine=False, residual=False, act="identity")])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.library.opcheck(operator(name), arguments(name, case, dtype, memory_format))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "sliced": lambda t: torch.cat([t, t], 1)[:, 1 : t.shape[1] + 1],
    "transposed": lambda t: t.transpose(2, 3),
}


@pytest.mark.parametrize("name", OPERATORS)
@given(
    case=cases(),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float64, *LOW_PRECISION]),
    saves=st.booleans(),
    change=st.sampled_from(list(CHANGES)),
)
@settings(family, max_examples=60)
def test_fakes(name: str, case: Case, last: bool, dtype: torch.dtype, saves: bool, change: str) -> None:
    """Shapes, dtypes and strides, those of single steps included, are the real ones'."""
    given_arguments = arguments(name, case, dtype, FORMATS[last], saves, CHANGES[change])

    def description(result: object) -> list[tuple]:
        return [(t.shape, t.stride(), t.dtype) for t in torch.utils._pytree.tree_leaves(result)]

    with FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given_arguments)
        fake = description(operator(name)(*faked))
    assert fake == description(operator(name)(*given_arguments))


@given(case=cases(), last=st.booleans(), dtype=st.sampled_from([torch.float64, *LOW_PRECISION]))
@settings(family, max_examples=60)
def test_mask(case: Case, last: bool, dtype: torch.dtype) -> None:
    """One bit per value, set where the output is not <= 0, pixel after pixel; zeros beyond the channels."""
    x, _, _, dout = case.build(dtype, FORMATS[last])
    x[..., 0][:, ::3] = torch.nan
    x[..., -1][:, 1::3] = -0.0
    zero, one = torch.zeros(case.channels), torch.ones(case.channels)
    if dtype == torch.float64:
        zero, one = zero.double(), one.double()
    out, mask = norm_operators.normalize_act(x, zero, one, None, None, None, 0.0, True, True)
    assert torch.equal(out.nan_to_num(7.0), torch.relu(x).nan_to_num(7.0))
    bits = mask.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    bits = bits.reshape(mask.shape[0], -1)
    assert mask.dtype == torch.uint8 and bits[:, case.channels :].sum() == 0
    passing = bits[:, : case.channels].bool()
    assert torch.equal(passing, (~(out <= 0)).permute(0, 2, 3, 1).reshape(-1, case.channels))
    _, dz = norm_operators.normalize_act_backward_apply(dout, mask, x, zero, one, None, None, 0.0, 0.0, True)
    expected = torch.where(passing, dout.permute(0, 2, 3, 1).reshape(-1, case.channels), 0)
    assert torch.equal(dz.permute(0, 2, 3, 1).reshape(-1, case.channels), expected)


def replaced(given_arguments: tuple, index: int, value: object) -> tuple:
    return (*given_arguments[:index], value, *given_arguments[index + 1 :])


@pytest.mark.parametrize(
    ("name", "index", "value", "error", "words"),
    [
        ("batch_statistics", 0, torch.randn(3, 5, 6), ValueError, r"\[N, C, H, W\], got \[3, 5, 6\]"),
        ("batch_statistics", 0, torch.randn(0, 5, 5, 6), ValueError, r"non-empty"),
        ("batch_statistics", 0, torch.ones(3, 5, 5, 6, dtype=torch.int32), TypeError, r"Int; accepted: Float"),
        ("normalize_act", 0, torch.randn(3, 6, 5, 6), ValueError, r"mean must be \[6\], got \[5\]"),
        ("normalize_act", 1, torch.zeros(4), ValueError, r"mean must be \[5\], got \[4\]"),
        ("normalize_act", 1, torch.zeros(5).double(), TypeError, r"mean is Double for an x of Float"),
        ("normalize_act", 2, torch.zeros(5, 1), ValueError, r"var must be \[5\], got \[5, 1\]"),
        ("normalize_act", 3, torch.zeros(6), ValueError, r"weight must be \[5\]"),
        ("normalize_act", 3, torch.zeros(5).half(), TypeError, r"weight is Half"),
        ("normalize_act", 4, torch.zeros(()), ValueError, r"bias must be \[5\]"),
        ("normalize_act", 5, torch.randn(3, 5, 5, 5), ValueError, r"residual must be \[3, 5, 5, 6\] as x is"),
        ("normalize_act", 5, torch.randn(3, 5, 5, 6).half(), TypeError, r"x is Float, residual is Half"),
        ("normalize_act", 6, -1.0, ValueError, r"eps"),
        ("normalize_act", 6, float("nan"), ValueError, r"eps"),
        ("normalize_act", 7, False, ValueError, r"save_mask=True needs relu=True"),
        ("normalize_act_backward_reduce", 0, torch.randn(2, 5, 5, 6), ValueError, r"dout must be"),
        ("normalize_act_backward_reduce", 0, torch.randn(3, 5, 5, 6).double(), TypeError, r"dout is Double"),
        ("normalize_act_backward_reduce", 1, torch.zeros(89, 1, dtype=torch.uint8), ValueError, r"mask.*\[90, 1\]"),
        ("normalize_act_backward_reduce", 1, torch.zeros(90, 1), TypeError, r"mask is Float; accepted: Byte"),
        ("normalize_act_backward_reduce", 3, torch.zeros(1), ValueError, r"mean must be"),
        ("normalize_act_backward_apply", 0, torch.randn(3, 5, 6, 5), ValueError, r"dout must be"),
        ("normalize_act_backward_apply", 1, torch.zeros(0).byte(), ValueError, r"mask"),
        ("normalize_act_backward_apply", 4, torch.zeros(4), ValueError, r"var must be"),
        ("normalize_act_backward_apply", 5, torch.zeros(4), ValueError, r"weight must be"),
        ("normalize_act_backward_apply", 6, torch.zeros(2, 4).double(), ValueError, r"sums must be \[2, 5\]"),
        ("normalize_act_backward_apply", 6, torch.zeros(2, 5), TypeError, r"sums is Float; accepted: Double"),
        ("normalize_act_backward_apply", 7, 0.0, ValueError, r"count=0"),
        ("normalize_act_backward_apply", 8, float("inf"), ValueError, r"eps"),
    ],
)
def test_bad_arguments_are_refused(name: str, index: int, value: object, error: type[Exception], words: str) -> None:
    """The operators themselves hold their arguments against each other: nothing is read out of bounds."""
    given_arguments = arguments(name, Case())
    operator(name)(*given_arguments)
    with pytest.raises(error, match=words):
        operator(name)(*replaced(given_arguments, index, value))


# --- SyncBatchNorm ---------------------------------------------------------------------------------------------------

CALLS = {
    "uneven": Shared((3, 1)),
    "channels far from zero": Shared((1, 4), 17, mean=100.0),
    "without residual": Shared((2, 3), residual=False, own_group=True),
    "without activation": Shared((2, 3), act="identity", momentum=None),
    "without affine": Shared((2, 1), affine=False),
    "float64": Shared((3, 2), dtype=torch.float64),
    "bfloat16": Shared((3, 2), 8, dtype=torch.bfloat16),
    "nothing in the second": Shared((2, 0)),
    "nothing in the first": Shared((0, 2), residual=False),
    "nothing in the second, bfloat16": Shared((3, 0), 8, dtype=torch.bfloat16),
    "nothing in the first, float16": Shared((0, 3), dtype=torch.float16),
    "one value each": Shared((1, 1), size=(1, 1)),
    "one value in all": Shared((1, 0), size=(1, 1)),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[dict]]]:
    """What each process got, call after call."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(compute, (list(CALLS.values()), str(folder)), nprocs=WORLD)
    yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "one value in all"])
def test_processes_share_their_batch(name: str, parts: list[list[dict]]) -> None:
    """Two processes give what one gives for both batches; gradients of weight and bias add up to its."""
    call = CALLS[name]
    shares = [part[list(CALLS).index(name)] for part in parts]
    eager = results(*call.tensors(), call.norm(nn.BatchNorm2d), call.act, "eager")
    exact = results(*call.tensors(torch.float64), call.norm(nn.BatchNorm2d).double(), call.act, "eager")
    for result, value in exact.items():
        if result in ("out", "grad of x", "grad of residual"):
            got = torch.cat([share[result] for share in shares])
        elif result.startswith("grad"):
            got = sum(share[result] for share in shares)
        else:
            assert torch.equal(shares[0][result], shares[1][result]), result
            got = shares[0][result]
        if call.dtype == torch.float64:
            torch.testing.assert_close(got, value)
        elif call.size != (1, 1) or result != "grad of x":  # of two values each gradient is the rounding of zero
            assert_as_accurate(f"{name}, {result}", got, eager[result], value)


def test_processes_refuse_one_value(parts: list[list[dict]]) -> None:
    """All of them, and without a trace."""
    for share in (part[list(CALLS).index("one value in all")] for part in parts):
        assert "more than 1 value per channel when training, got 1 over the 2 processes" in share["error"]
        assert share["moved"] == []
