"""A bad call raises the right error, says what was given and what is accepted, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.blocks import block
from support.matrix import BACKENDS
from support.named_tensors import named_tensors
from torch import Tensor

from resnet_fused import functional
from resnet_fused.errors import BackendError
from resnet_fused.params import BlockParams, map_tensors
from resnet_fused.spec import Activation, BlockSpec, StageSpec

Call = tuple[Tensor, BlockParams, BlockSpec]

backends = pytest.mark.parametrize("backend", ["auto", "eager", *BACKENDS])

CASE = block(3, "projection", channels=4, width=3, out_channels=6, stride=2, size=(7, 6), bias=True)


def change_x(change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    return lambda call: (change(call[0]), *call[1:])


def change_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Call], Call]:
    return lambda call: (call[0], map_tensors(call[1], lambda n, t: change(t) if n == name else t), call[2])  # type: ignore[arg-type, return-value]


def change_params(**changes: object) -> Callable[[Call], Call]:
    return lambda call: (call[0], replace(call[1], **changes), call[2])  # type: ignore[arg-type]


def change_spec(change: Callable[[BlockSpec], BlockSpec]) -> Callable[[Call], Call]:
    return lambda call: (call[0], call[1], change(call[2]))


def change_stage(i: int, **changes: object) -> Callable[[Call], Call]:
    def change(spec: BlockSpec) -> BlockSpec:
        stages = list(spec.stages)
        stages[i] = replace(stages[i], **changes)  # type: ignore[arg-type]
        return replace(spec, stages=tuple(stages))

    return change_spec(change)


def frozen_without_statistics(call: Call) -> Call:
    return change_tensor("stages.1.running_mean", lambda t: None)(change_stage(1, batch_stats=False)(call))


BAD: dict[str, tuple[Callable[[Call], Call], type[Exception], str]] = {
    "channels of x": (
        change_x(lambda x: x[:, :3]),
        ValueError,
        r"stages\[0\] receives 3 channels.*takes 4 and gives 3",
    ),
    "eps of 0 in training": (
        change_stage(1, eps=0.0),
        ValueError,
        r"the eps of stages\[1\] is 0 in training; accepted: a finite number > 0",
    ),
    "3-d": (change_x(lambda x: x[0]), ValueError, r"x must be 4-d \[N, C, H, W\], got 3-d \(4, 7, 6\)"),
    "5-d": (change_x(lambda x: x[None]), ValueError, r"x must be 4-d.*got 5-d"),
    "integers": (change_x(lambda x: x.long()), TypeError, r"x is torch.int64; accepted: .*float32.*bfloat16"),
    "complex": (change_x(lambda x: x.cfloat()), TypeError, r"x is torch.complex64; accepted: .*float32"),
    "no tensor": (change_x(lambda x: x.tolist()), TypeError, r"x must be a tensor, got list"),
    "x in another dtype": (change_x(lambda x: x.half()), TypeError, r"x is torch.float16.*torch.float32.*autocast"),
    "weight in another dtype": (
        change_tensor("stages.1.weight", lambda t: t.double()),
        TypeError,
        r"x is torch.float32 but .*stages\[1\] is torch.float64",
    ),
    "bias in another dtype": (
        change_tensor("projection.bias", lambda t: t.double()),
        TypeError,
        r"x is torch.float32 but .*projection is torch.float64",
    ),
    "norm in another dtype": (
        change_tensor("stages.2.norm_weight", lambda t: t.double()),
        TypeError,
        r"stages\[2\].norm_weight is torch.float64 for an input of torch.float32; accepted: torch.float32",
    ),
    "statistics in another dtype": (
        change_tensor("stages.0.running_var", lambda t: t.bfloat16()),
        TypeError,
        r"stages\[0\].running_var is torch.bfloat16.*accepted: torch.float32",
    ),
    "weight is a matrix": (
        change_tensor("stages.0.weight", lambda t: t[..., 0, 0]),
        ValueError,
        r"stages\[0\].weight must be 4-d.*got \(3, 4\)",
    ),
    "length of a bias": (
        change_tensor("stages.0.bias", lambda t: t[:2]),
        ValueError,
        r"stages\[0\].bias must be \[3\], got \[2\]",
    ),
    "length of gamma": (
        change_tensor("stages.1.norm_weight", lambda t: t[:2]),
        ValueError,
        r"stages\[1\].norm_weight must be \[3\], got \[2\]",
    ),
    "length of beta": (
        change_tensor("projection.norm_bias", lambda t: t.repeat(2)),
        ValueError,
        r"projection.norm_bias must be \[6\], got \[12\]",
    ),
    "length of a running mean": (
        change_tensor("stages.2.running_mean", lambda t: t[:1]),
        ValueError,
        r"stages\[2\].running_mean must be \[6\], got \[1\]",
    ),
    "shape of a running variance": (
        change_tensor("stages.2.running_var", lambda t: t[None]),
        ValueError,
        r"stages\[2\].running_var must be \[6\], got \[1, 6\]",
    ),
    "no statistics in evaluation": (
        frozen_without_statistics,
        ValueError,
        r"stages\[1\] normalises with running statistics.*has none",
    ),
    "groups": (change_stage(1, groups=2), ValueError, r"stages\[1\] receives 3 channels.*groups=2.*takes 6"),
    "kernel larger than x": (
        change_stage(0, padding=0, dilation=4),
        ValueError,
        r"stages\[0\]: a kernel of \(3, 3\) \(dilation \(4, 4\), padding \(0, 0\)\) does not fit an input of 7x6",
    ),
    "one value per channel": (
        change_x(lambda x: x[:1, :, :1, :1]),
        ValueError,
        r"more than 1 value per channel when training, got input size \[1, 3, 1, 1\]",
    ),
    "skip path of another size": (
        change_spec(lambda s: replace(s, projection=replace(s.projection, stride=1))),  # type: ignore[type-var]
        ValueError,
        r"skip path gives 6x7x6 but the branch gives 6x4x3.*projection",
    ),
    "identity skip of another width": (
        lambda call: (call[0], replace(call[1], projection=None), replace(call[2], skip="identity", projection=None)),
        ValueError,
        r"skip path gives 4x7x6 but the branch gives 6x4x3",
    ),
    "too few stages": (
        lambda call: (call[0], replace(call[1], stages=call[1].stages[:2]), call[2]),
        ValueError,
        r"params hold 2 stages with a projection, the spec has 3 with a projection",
    ),
    "no projection in params": (
        change_params(projection=None),
        ValueError,
        r"params hold 3 stages without a projection, the spec has 3 with a projection",
    ),
    "a projection counted as a stage": (
        lambda call: (call[0], BlockParams(call[1].convs), call[2]),
        ValueError,
        r"params hold 4 stages without a projection, the spec has 3 with a projection",
    ),
    "length of a scale": (
        change_params(branch_scale=torch.ones(4)),
        ValueError,
        r"branch_scale must hold one value or one per channel \(6\), got \(4,\)",
    ),
    "shape of a scale": (
        change_params(skip_scale=torch.ones(2, 3)),
        ValueError,
        r"skip_scale must hold one value or one per channel \(6\), got \(2, 3\)",
    ),
    "integer scale": (
        change_params(branch_scale=torch.ones(6, dtype=torch.int64)),
        TypeError,
        r"branch_scale must be floating point, got torch.int64",
    ),
    "weight elsewhere": (
        change_tensor("stages.0.weight", lambda t: t.to("meta")),
        ValueError,
        r"x is on cpu but stages\[0\] is on meta; move",
    ),
    "gamma elsewhere": (
        change_tensor("stages.0.norm_weight", lambda t: t.to("meta")),
        ValueError,
        r"x is on cpu but stages\[0\].norm_weight is on meta; move",
    ),
    "scale elsewhere": (
        change_params(branch_scale=torch.ones(6, device="meta")),
        ValueError,
        r"x is on cpu but branch_scale is on meta; move",
    ),
}


def assert_refused(call: Call, params: BlockParams, backend: str, error: type[Exception], words: str) -> None:
    """`call` raises, and no bit of the good block's tensors, which it shares, has changed."""
    before = {name: (t.clone(), t._version) for name, t in named_tensors(params).items()}
    with pytest.raises(error, match=words) as caught:
        functional.residual_block(*call, backend=backend)
    assert type(caught.value) is error
    for name, t in named_tensors(params).items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1], f"{name} has changed"


@backends
@pytest.mark.parametrize("name", BAD)
def test_bad_call(name: str, backend: str) -> None:
    change, error, words = BAD[name]
    good = CASE.build(torch.float32)
    assert_refused(change(good), good[1], backend, error, words)


@backends
@pytest.mark.parametrize("order", ["post", "pre"])
def test_one_value_per_channel_late_in_the_chain(order: str, backend: str) -> None:
    """Only the last norm is short of values: the statistics of those before it must not move either."""
    case = block(3, "none", order=order, kernel=1, stride=2, batch=1, size=(2, 2))  # type: ignore[arg-type]
    call = case.build(torch.float32)
    assert_refused(
        call,
        call[1],
        backend,
        ValueError,
        r"more than 1 value per channel when training, got input size \[1, .*, 1, 1\]",
    )


@backends
def test_pre_activation_norms_have_the_width_of_their_input(backend: str) -> None:
    call = block(2, "none", order="pre", channels=4, width=3, out_channels=5).build(torch.float32)
    bad = change_tensor("stages.0.norm_weight", lambda t: t[:3])(call)
    assert_refused(bad, call[1], backend, ValueError, r"stages\[0\].norm_weight must be \[4\], got \[3\]")


def test_half_precision_accepts_norms_in_float32() -> None:
    call = CASE.build(torch.bfloat16, norm_dtype=torch.float32)
    assert functional.residual_block(*call).dtype == torch.bfloat16
    call = CASE.build(torch.bfloat16, norm_dtype=torch.float64)
    assert_refused(call, call[1], "auto", TypeError, r"torch.float64.*accepted: torch.bfloat16, torch.float32")


def test_unknown_backend() -> None:
    call = CASE.build(torch.float32)
    assert_refused(call, call[1], "cudnn", ValueError, r"unknown backend 'cudnn'; accepted: 'auto', 'native'.*'eager'")


@pytest.mark.usefixtures("no_interpreter")
def test_backend_for_another_device() -> None:
    call = CASE.build(torch.float32)
    assert_refused(
        call, call[1], "triton", BackendError, r"'triton' cannot run this block: .*Accepted here: 'auto', 'eager'"
    )


def test_native_backend_on_another_device() -> None:
    x, params, spec = CASE.build(torch.float32)
    elsewhere = map_tensors(params, lambda name, t: t.to("meta"))
    assert_refused((x.to("meta"), elsewhere, spec), params, "native", BackendError, r"'native' cannot run.*meta")


@backends
def test_empty_batch(backend: str) -> None:
    """As eager PyTorch: no error, an empty output."""
    x, params, spec = replace(CASE, spec=replace(CASE.spec)).build(torch.float32)
    out = functional.residual_block(x[:0], params, spec, backend=backend)
    assert out.shape == (0, *CASE.out_shape[1:])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: StageSpec(stride=0), r"stride must be an int or a pair of ints >= 1, got 0"),
        (lambda: StageSpec(stride=(1, 2, 3)), r"stride.*got \(1, 2, 3\)"),
        (lambda: StageSpec(padding=-1), r"padding must be an int or a pair of ints >= 0, got -1"),
        (lambda: StageSpec(padding=(0, 0.5)), r"padding.*got \(0, 0.5\)"),
        (lambda: StageSpec(dilation=(1, 0)), r"dilation must be.*>= 1, got \(1, 0\)"),
        (lambda: StageSpec(padding="same"), r"padding must be an int or a pair of ints >= 0, got 'same'"),
        (lambda: StageSpec(padding=1.5), r"padding must be an int or a pair of ints >= 0, got 1.5"),
        (lambda: StageSpec(groups=0), r"groups must be a positive int, got 0"),
        (lambda: StageSpec(groups=1.0), r"groups must be a positive int, got 1.0"),
        (lambda: StageSpec(eps=-1e-5), r"eps must be a finite number >= 0, got -1e-05"),
        (lambda: StageSpec(eps=float("nan")), r"eps must be a finite number >= 0, got nan"),
        (lambda: StageSpec(act="mish"), r"act must be one of 'identity', 'relu', .*, got 'mish'"),
        (lambda: Activation("leaky_relu", float("nan")), "the parameter of leaky_relu must be finite, got nan"),
        (lambda: BlockSpec(()), r"at least one stage"),
        (
            lambda: BlockSpec((StageSpec(),), "dense"),
            r"skip must be one of 'none', 'identity', 'projection', got 'dense'",
        ),
        (lambda: BlockSpec((StageSpec(),), "projection"), r"skip='projection' does not go with projection=None"),
        (lambda: BlockSpec((StageSpec(),), "identity", StageSpec(act="identity")), r"skip='identity' does not go with"),
        (lambda: BlockSpec((StageSpec(),), "projection", StageSpec()), r"no activation of its own, got act='relu'"),
        (
            lambda: BlockSpec((StageSpec(),), order="middle"),
            r"order must be one of 'post', .*, got 'middle'",
        ),
        (lambda: BlockSpec((StageSpec(),), memory="none"), r"memory must be one of 'default', 'low', got 'none'"),
        (
            lambda: BlockSpec((StageSpec(),), "projection", StageSpec(act="identity"), "pre"),
            r"pre-activation projection.*set norm=False",
        ),
    ],
)
def test_bad_specs(build: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_specs_are_values() -> None:
    """Equal, hashable and frozen: they key caches."""
    assert StageSpec(2, 1) == StageSpec((2, 2), (1, 1)) and hash(StageSpec(2, 1)) == hash(StageSpec((2, 2), (1, 1)))
    spec = BlockSpec([StageSpec()])  # type: ignore[arg-type]
    assert spec == BlockSpec((StageSpec(),)) and hash(spec) == hash(BlockSpec((StageSpec(),)))
    with pytest.raises(AttributeError):
        spec.order = "pre"  # type: ignore[misc]


def test_an_activation_is_a_value_or_a_name() -> None:
    with pytest.raises(TypeError, match=r"act must be an Activation or one of 'identity', 'relu', .*, got <built-in"):
        StageSpec(act=torch.relu)  # type: ignore[arg-type]
