"""torch.ops.resnet_fused.*: schemas, fakes and the flat form of a spec, as torch.compile and export rely on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import Case, block, frozen
from support.fake_kernels import assert_fake_agrees
from support.matrix import FORMATS, family
from support.operator_arguments import (
    CASES,
    Arguments,
    arguments,
    backward_arguments,
    evaluate_arguments,
    forward_arguments,
    infer_arguments,
    tensors_in,
)
from support.random_blocks import EVERY, EXACT, cases

from resnet_fused.ops.encoding import decode, encode
from resnet_fused.spec.facts import facts
from resnet_fused.spec.tensors import convolution_places


def operator(name: str) -> Callable:
    return getattr(torch.ops.resnet_fused, name).default


BLOCK_OPERATORS = [
    "residual_block_forward",
    "residual_block_backward",
    "residual_block_infer",
    "residual_block_evaluate",
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BLOCK_OPERATORS)
def test_opcheck(name: str, case: str, memory_format: torch.memory_format) -> None:
    torch.library.opcheck(operator(name), arguments(name, CASES[case], torch.float32, memory_format))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_evaluation_with_pooling(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    given = evaluate_arguments(*frozen(CASES["stem"]).build(dtype, memory_format), pool=(3, 2, 1))
    torch.library.opcheck(operator("residual_block_evaluate"), given)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_max_pool(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9, 7, dtype=dtype).contiguous(memory_format=memory_format)
    torch.library.opcheck(operator("max_pool2d"), (x, 3, 2, 1))
    out, positions = operator("max_pool2d")(x, 3, 2, 1)
    torch.library.opcheck(operator("max_pool2d_backward"), (torch.rand_like(out), positions, 9, 7, 3, 2, 1))


@pytest.mark.parametrize("name", BLOCK_OPERATORS)
@given(
    case=cases(**EVERY),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    float_norms=st.booleans(),
)
@settings(family, max_examples=80)
def test_fakes_of_any_block(name: str, case: Case, last: bool, dtype: torch.dtype, float_norms: bool) -> None:
    """Shapes, strides and dtypes of the fake kernels are the real ones'."""
    assert_fake_agrees(operator(name), arguments(name, case, dtype, FORMATS[last]))


@pytest.mark.parametrize("name", BLOCK_OPERATORS)
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("arrangement", ["dense", "sliced", "transposed"])
def test_fakes_of_mixed_layouts(arrangement: str, weight_last: bool, x_last: bool, name: str) -> None:
    case = block(2, "projection", channels=4, out_channels=6, size=(6, 6))
    x, params, spec = case.build(torch.float32, FORMATS[weight_last])
    x = x.contiguous(memory_format=FORMATS[x_last])
    if arrangement == "sliced":
        x = torch.cat([x, x], 1).contiguous(memory_format=FORMATS[x_last])[:, 2:6]
    elif arrangement == "transposed":
        x = x.transpose(2, 3)
    dout = case.upstream(torch.float32).contiguous(memory_format=FORMATS[not x_last])
    given = {
        "residual_block_forward": lambda: forward_arguments(x, params, spec),
        "residual_block_backward": lambda: backward_arguments(x, params, spec, dout, [True] * tensors_in(spec)),
        "residual_block_infer": lambda: infer_arguments(x, params, spec),
        "residual_block_evaluate": lambda: evaluate_arguments(
            x, *frozen(case).build(torch.float32, FORMATS[weight_last])[1:]
        ),
    }[name]()
    assert_fake_agrees(operator(name), given)


def test_gradients_of_weights_in_the_masters_dtype() -> None:
    """Those of convolutions' weights and biases, cast, and nothing else."""
    case = CASES["low memory"]
    x, params, spec = case.build(torch.bfloat16, torch.channels_last)
    given = backward_arguments(x, params, spec, case.upstream(torch.bfloat16), [True] * tensors_in(spec))
    backward = operator("residual_block_backward")
    assert_fake_agrees(partial(backward, master=torch.float32), given)
    places = [place for place, need in enumerate(given[-3]) if need]  # type: ignore[arg-type, var-annotated]
    convs = convolution_places(len(spec.convs))
    for place, grad, plain in zip(places, backward(*given, master=torch.float32), backward(*given), strict=True):
        assert grad.dtype == (torch.float32 if place in convs else plain.dtype), place
        assert torch.equal(grad.to(plain.dtype), plain), place
    with pytest.raises(TypeError, match="floating-point"):
        backward(*given, master=torch.int64)


@given(case=cases(**EXACT), choice=st.lists(st.booleans(), min_size=31, max_size=31))
@settings(family, max_examples=80)
def test_backward_gives_the_gradients_asked_for(case: Case, choice: list[bool]) -> None:
    """One for each need, whichever they are, and the same as when all are asked for."""
    x, params, spec = case.build()
    count, dout = tensors_in(spec), case.upstream()
    given = backward_arguments(x, params, spec, dout, choice[:count])
    everything = backward_arguments(x, params, spec, dout, [True] * count)
    assert_fake_agrees(operator("residual_block_backward"), given)
    wanted, all_wanted = given[-3], everything[-3]
    grads = iter(operator("residual_block_backward")(*everything))
    full = [next(grads) if need else None for need in all_wanted]  # type: ignore[attr-defined]
    some = operator("residual_block_backward")(*given)
    assert len(some) == sum(wanted)  # type: ignore[call-overload]
    for grad, expected in zip(some, [g for g, need in zip(full, wanted, strict=True) if need], strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(3, 9), st.integers(3, 9)),
    window=st.sampled_from([(3, 2, 1), (2, 2, 0), (3, 1, 0), (1, 1, 0)]),
    last=st.booleans(),
    sliced=st.booleans(),
)
@settings(family, max_examples=80)
def test_fakes_of_max_pool(shape: tuple[int, ...], window: tuple[int, int, int], last: bool, sliced: bool) -> None:
    x = torch.randn(shape).contiguous(memory_format=FORMATS[last])
    x = x[..., 1:] if sliced and shape[3] > 3 else x
    assert_fake_agrees(operator("max_pool2d"), (x, *window))
    out, positions = operator("max_pool2d")(x, *window)
    for memory_format in FORMATS:
        dout = torch.ones_like(out).contiguous(memory_format=memory_format)
        assert_fake_agrees(operator("max_pool2d_backward"), (dout, positions, *x.shape[2:], *window))


@given(case=cases(**EVERY))
@settings(family, max_examples=300)
def test_encoding_round_trip(case: Case) -> None:
    """All but `batch_stats` of a stage without norm, which means nothing there."""
    encoded = encode(case.spec)
    decoded, known = decode(*encoded)
    stages = tuple(replace(s, batch_stats=s.norm and s.batch_stats) for s in case.spec.stages)
    projection = case.spec.projection
    if projection is not None:
        projection = replace(projection, batch_stats=projection.norm and projection.batch_stats)
    assert decoded == replace(case.spec, stages=stages, projection=projection, memory="default", in_place_add=False)
    assert known == facts(case.spec)
    assert encode(replace(decoded, memory=case.spec.memory)) == encoded


@given(a=cases(**EVERY), b=cases(**EVERY))
@settings(family, max_examples=300)
def test_different_blocks_encode_differently(a: Case, b: Case) -> None:
    decoded = [decode(*encode(case.spec)) for case in (a, b)]
    assert (decoded[0] == decoded[1]) == (encode(a.spec) == encode(b.spec))


def replaced(given: Arguments, index: int, value: object) -> Arguments:
    return (*given[:index], value, *given[index + 1 :])


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("residual_block_forward", 0, torch.randn(2, 4, 7)),
        ("residual_block_forward", 0, torch.randn(2, 5, 7, 6)),
        ("residual_block_forward", 0, torch.randn(2, 4, 7, 6, dtype=torch.float64)),
        ("residual_block_forward", 1, torch.ones(5)),
        ("residual_block_forward", 3, []),
        ("residual_block_forward", 5, [torch.ones(2)] * 4),
        ("residual_block_forward", 8, [None]),
        ("residual_block_forward", 9, [torch.ones(3)] * 4),
        ("residual_block_forward", 10, []),
        ("residual_block_forward", 10, [3, 2, 0, 0, 1, 1]),
        ("residual_block_forward", 11, []),
        ("residual_block_backward", 0, torch.randn(2, 6, 4, 4)),
        ("residual_block_backward", 0, torch.randn(2, 6, 4, 3, dtype=torch.float64)),
        ("residual_block_backward", 1, None),
        ("residual_block_backward", 1, torch.randn(2, 6, 3, 3)),
        ("residual_block_backward", 2, []),
        ("residual_block_backward", 2, [torch.randn(2, 3, 1, 1)] * 4),
        ("residual_block_backward", 3, []),
        ("residual_block_backward", 3, [torch.randn(2, 1)] * 4),
        ("residual_block_backward", 14, [True]),
        ("residual_block_infer", 0, torch.randn(2, 5, 7, 6)),
        ("residual_block_infer", 3, []),
        ("residual_block_infer", 4, [torch.ones(2)] * 4),
        ("residual_block_infer", 5, torch.ones(5)),
        ("residual_block_infer", 7, [None]),
        ("residual_block_infer", 8, torch.randn(2, 5, 7)),
        ("residual_block_infer", 9, [3, 2]),
    ],
)
def test_bad_arguments_are_refused(name: str, index: int, value: object) -> None:
    """The operators themselves hold their arguments against the spec: nothing is read out of bounds."""
    given = arguments(name, CASES["bottleneck"], torch.float32, torch.contiguous_format)
    operator(name)(*given)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        operator(name)(*replaced(given, index, value))


def test_bad_pooling_is_refused() -> None:
    x = torch.randn(1, 4, 6, 6)
    out, positions = operator("max_pool2d")(x, 3, 2, 1)
    for bad in ((x, 16, 2, 1), (x, 3, 0, 1), (x, 3, 2, 2), (x[0], 3, 2, 1), (x[:, :, :1, :1], 3, 2, 0)):
        with pytest.raises((ValueError, RuntimeError)):
            operator("max_pool2d")(*bad)
    for bad in (
        (out, positions.int(), 6, 6, 3, 2, 1),
        (out, positions[:, :2], 6, 6, 3, 2, 1),
        (out, positions, 60, 6, 3, 2, 1),
        (out[:, :2], positions, 6, 6, 3, 2, 1),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            operator("max_pool2d_backward")(*bad)
