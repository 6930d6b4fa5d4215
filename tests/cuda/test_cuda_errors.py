"""What cannot run is refused by name and changes nothing."""

from __future__ import annotations

import pytest
import torch
from support.blocks import bottleneck
from support.cuda_operators import OPERATORS, arguments, operator
from support.emulated_blocks import block
from support.emulated_checks import Checks, modes
from support.named_tensors import is_buffer, leaves, named_tensors
from support.operator_arguments import CASES
from support.padding import MODES, padded
from support.runs import run
from support.same_bits import assert_same_bits
from torch import Tensor

from resnet_fused import _C, functional  # type: ignore[attr-defined]
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec, PaddingMode


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("forward", 0, torch.randn(2, 4, 7), "non-empty"),
        ("forward", 0, torch.randn(2, 5, 7, 6), "receives 5 channels"),
        ("forward", 0, torch.randn(2, 4, 7, 6).double(), "x is Double"),
        ("forward", 1, torch.ones(5), "branch_scale must hold 1 value or 6"),
        ("forward", 3, [], "one entry for each convolution"),
        ("forward", 5, [torch.ones(2)] * 4, "must be"),
        ("forward", 8, [None], "one entry for each convolution"),
        ("forward", 9, [torch.ones(3)] * 4, "exactly where its activation is prelu"),
        ("forward", 10, [3, 2, 0, 0, 0], "5 \\+ 13 k ints"),
        ("forward", 11, [0.1], "needs 8 floats"),
        ("backward", 0, torch.randn(2, 6, 4, 4), "dout must be"),
        ("backward", 0, torch.randn(2, 6, 4, 3).double(), "dout is Double"),
        ("backward", 1, None, "needs the block's output"),
        ("backward", 1, torch.randn(2, 6, 3, 3), "needs the block's output"),
        ("backward", 2, [], "the output of convolution 0 must be saved"),
        ("backward", 2, [torch.randn(2, 3, 1, 1)] * 4, "the output of convolution 0 must be saved"),
        ("backward", 3, [torch.randn(2, 1)] * 4, "batch statistics of convolution 0"),
        ("backward", 14, [True], "needs must have 31 flags"),
        ("infer", 0, torch.randn(2, 5, 7, 6), "receives 5 channels"),
        ("infer", 4, [torch.ones(2)] * 4, "bias of convolution 0"),
        ("infer", 7, [None], "got 1 slopes"),
        ("infer", 9, [3, 2], "5 \\+ 13 k ints"),
    ],
)
def test_bad_arguments_are_refused(name: str, index: int, value: object, message: str, check: Checks) -> None:
    """The operators hold their arguments against the spec: nothing is read out of bounds."""
    check.set()
    given = arguments(name, CASES["bottleneck"], check)
    given[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        operator(name)(*given)
    assert check.emulator.launched() == []


@pytest.mark.parametrize("mode", MODES)
def test_padding_by_values_is_refused(mode: PaddingMode, check: Checks) -> None:
    """By the operators, too: the kernels read zeros outside a picture."""
    check.set()
    for name in OPERATORS:
        with pytest.raises(ValueError, match="pad with zeros only"):
            operator(name)(*arguments(name, padded(CASES["bottleneck"], mode), check))
    assert check.emulator.launched() == []


def test_saved_tensors_of_another_dtype_are_refused(check: Checks) -> None:
    check.set()
    given = arguments("backward", CASES["bottleneck"], check)
    for index in (2, 3):
        wrong = list(given)
        wrong[index] = [t.bfloat16() for t in given[index]]
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            operator("backward")(*wrong)


def test_unsupported_dtype_is_named(check: Checks) -> None:
    check.set()
    case = block()
    given = case.build(torch.float64)
    with pytest.raises(TypeError, match="float32, bfloat16 and float16, got Double"):
        run(*given, "emulated", case.upstream(torch.float64))


def test_too_large_is_named(check: Checks) -> None:
    check.set()
    tall = block(1, "none", channels=1, out_channels=1, kernel=1, norm=False, size=(1 << 14, 1), batch=1)
    with pytest.raises(ValueError, match="up to 16383 rows"):
        run(*tall.build(torch.bfloat16), "emulated")
    wide = block(1, "none", channels=1, out_channels=1 << 14, kernel=1, norm=False, size=(256, 129), batch=1)
    with pytest.raises(ValueError, match="about 2\\^29 values per image"):
        run(*wide.build(torch.bfloat16), "emulated")
    assert check.emulator.launched() == []


def test_a_device_without_room_is_named(check: Checks) -> None:
    given = bottleneck("identity").build(torch.float32)
    check.set(shared_memory=20)
    with pytest.raises(RuntimeError, match=r"a phase needs \d+ bytes of shared memory, device 0 has 20480"):
        run(*given, "emulated")
    check.set(device=(1, 0))
    with pytest.raises(RuntimeError, match="no worker with"):
        run(*given, "emulated")


def buffers(given: tuple[Tensor, BlockParams, BlockSpec]) -> dict[str, Tensor]:
    return {name: t for name, t in named_tensors(given[1]).items() if is_buffer(name)}


@modes
def test_a_failing_launch_changes_nothing(mode: str, check: Checks) -> None:
    """It is an error with the launcher's text, statistics stay as they were, and the next call does not know of it."""
    check.set(mode)
    case = bottleneck("projection")
    x, params, spec = given = case.build(torch.float32, torch.channels_last)
    dout = case.upstream(torch.float32)
    expected = run(*given, "emulated", dout)
    count = len(check.emulator.launched())
    before = {name: t.clone() for name, t in buffers(given).items()}
    for launches in range(count):
        check.emulator.configure()
        check.emulator.fail_at(launches, "the emulated device is out of order")
        x.grad, chosen = None, leaves(params, lambda _: True)
        with pytest.raises(RuntimeError, match="resnet_fused: the emulated device is out of order"):
            functional.residual_block(x.requires_grad_(), chosen, spec, backend="emulated").backward(dout)
        in_forward = launches < (1 if mode == "single" else 5)
        for name, t in named_tensors(chosen).items():
            if is_buffer(name):
                assert torch.equal(t, before[name]) == in_forward, name
            else:
                assert t.grad is None, name
        assert x.grad is None
    check.emulator.configure()
    assert_same_bits(run(*given, "emulated", dout), expected)


def test_without_a_device_nothing_runs(check: Checks) -> None:
    """What a user meets who calls the overload on CPU tensors."""
    check.set()
    given, dout = bottleneck("identity").build(torch.float32), bottleneck("identity").upstream(torch.float32)
    before = {name: t.clone() for name, t in buffers(given).items()}
    _C.install_emulator(0)
    try:
        with pytest.raises(NotImplementedError, match="CUDA kernels run on CUDA tensors, x is on the CPU"):
            functional.residual_block(*given, backend="emulated")
        for name in OPERATORS:
            with pytest.raises(NotImplementedError, match="CUDA kernels run on CUDA tensors"):
                operator(name)(*arguments(name, CASES["bottleneck"], check))
    finally:
        check.emulator.install()
    assert all(torch.equal(t, before[name]) for name, t in buffers(given).items())
    run(*given, "emulated", dout)
