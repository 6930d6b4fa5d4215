"""A few training steps of a model, recorded, and the comparison of a fused model's steps with eager's."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict

import torch
import torch.nn.functional as F
from support.equivalence import FLOOR_ULPS
from support.kinks import Kinks
from torch import Tensor, nn

from resnet_fused import fuse, unfuse
from resnet_fused.modules.fuse import MatchBy
from resnet_fused.spec import Memory

Record = dict[str, Tensor | None]
KINDS = ("output", "gradient of the input", "gradient of ", "")  # by prefix; the rest are buffers
LAST = torch.channels_last
FP64_LIMIT = 1e-9  # rounding, 1e-16, as training amplifies it; a wrong formula is off by far more


def assert_trains_as_eager(
    model: nn.Module,
    pictures: Tensor,
    *,
    steps: int = 1,
    autocast: torch.dtype | None = None,
    memory: Memory = "default",
    match: MatchBy = "class",
) -> None:
    """Copies of `model`, fused and eager, give the same outputs, gradients and buffers over `steps` training steps.

    In fp64 every tensor agrees to `FP64_LIMIT`. In the model's own dtype, or under autocast, the rule of
    `equivalence` holds for each kind of quantity, in the 2-norm: a network multiplies rounding, and the largest of
    its deviations is luck. Eager's error is the larger of its two memory formats', which round differently by up to
    four times. In fp32 a ReLU's input may also land on the other side of zero in one run only: what such flips do to
    the exact run counts as eager's rounding too (`kinks`).
    """
    eager = unfuse(copy.deepcopy(model))
    fused = fuse(copy.deepcopy(eager), memory=memory, match=match)
    eager64, fused64 = copy.deepcopy(eager).double(), copy.deepcopy(fused).double()
    flipped64 = copy.deepcopy(eager64)
    kinks = Kinks(torch.float32) if autocast is None and pictures.dtype == torch.float32 else None

    with kinks.record() if kinks else contextlib.nullcontext():
        expected = train(eager, pictures, steps=steps, autocast=autocast)
    with kinks.measure() if kinks else contextlib.nullcontext():
        exact = train(eager64, pictures.double(), steps=steps)
    got = train(fused, pictures, steps=steps, autocast=autocast)
    assert got.keys() == expected.keys() == exact.keys()
    assert describe(got) == describe(expected)
    _assert_same(train(fused64, pictures.double(), steps=steps), exact)

    other = torch.contiguous_format if pictures.is_contiguous(memory_format=LAST) else LAST
    eager = unfuse(copy.deepcopy(model)).to(memory_format=other)  # type: ignore[call-overload]
    rounding = [expected, train(eager, pictures.to(memory_format=other), steps=steps, autocast=autocast)]
    if kinks:
        with kinks.flip():
            rounding.append(train(flipped64, pictures.double(), steps=steps))
    for kind, names in _kinds(exact).items():
        error = _error(got, exact, names)
        floor = max(
            FLOOR_ULPS * torch.finfo(value.dtype).eps for name in names if (value := expected[name]) is not None
        )
        eager_error = max(_error(run, exact, names) for run in rounding)
        assert error <= max(2 * eager_error, floor), f"{kind}: error {error:.3g}, eager's is {eager_error:.3g}"


def train(
    model: nn.Module, pictures: Tensor, *, steps: int = 1, autocast: torch.dtype | None = None, lr: float = 1e-3
) -> Record:
    """SGD with momentum on the same labelled pictures: every step's output, the last step's gradients, the buffers.

    A feature map stands for its channels' means. Also the output of the trained model in eval mode.
    """
    labels = torch.arange(len(pictures)) % 5
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9) if parameters else None
    outputs = []
    for step in range(steps):
        torch.manual_seed(step)  # for stochastic depth
        model.zero_grad()
        x = pictures.clone().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model(x)
        outputs.append(out.detach())
        logits = out if out.dim() == 2 else out.mean((2, 3))
        F.cross_entropy(logits.to(x.dtype), labels).backward()
        if optimizer is not None:
            optimizer.step()
    seen: Record = {"output": torch.stack(outputs), "gradient of the input": x.grad}
    seen |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    seen |= dict(model.named_buffers())
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        seen["output in evaluation"] = model.eval()(pictures)
    for module, mode in modes.items():
        module.training = mode
    return seen


def describe(record: Record) -> dict[str, tuple[torch.dtype, torch.Size] | None]:
    """Which quantities there are, with dtype and shape."""
    return {name: None if value is None else (value.dtype, value.shape) for name, value in record.items()}


def _assert_same(got: Record, exact: Record) -> None:
    assert describe(got) == describe(exact)
    for name, value in exact.items():
        if value is None:
            continue
        result = got[name]
        assert result is not None
        if value.is_floating_point():
            error = float((result - value).abs().max() / value.abs().max().clamp(min=1e-300))
            assert error <= FP64_LIMIT, f"{name} in fp64: error {error:.3g}"
        else:
            assert torch.equal(result, value), f"{name}: {result} instead of {value}"


def _kinds(exact: Record) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, value in exact.items():
        if value is not None and value.is_floating_point():
            kinds[next(kind for kind in KINDS if name.startswith(kind)) or "buffers"].append(name)
    return kinds


def _error(record: Record, exact: Record, names: list[str]) -> float:
    """Root mean square over the named tensors of the error's norm relative to the exact tensor's."""
    errors = []
    for name in names:
        value, truth = record[name], exact[name]
        assert value is not None
        assert truth is not None
        errors.append((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))
    return float(torch.stack(errors).square().mean().sqrt())
