"""Bottlenecks with frozen batch norms: what their forward keeps for backward, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.blocks import Case, ScaleKind, bottleneck, frozen
from support.named_tensors import leaves, named_tensors
from torch import Tensor

from resnet_fused import functional
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec, Memory, Order, Skip
from resnet_fused.spec.facts import facts
from resnet_fused.tools.saved_bytes import saved_bytes

UNIT = 2 * 4 * 6 * 8 * 4  # bytes of a float32 activation of the bottleneck's inner width


def frozen_bottleneck(
    skip: Skip,
    order: Order = "post",
    memory: Memory = "default",
    act: str = "relu",
    scale: ScaleKind = "one",
    stride: int = 1,
) -> Case:
    """With widths of 8 and 32."""
    shape: dict[str, Any] = {"channels": 32, "width": 8, "stride": stride, "size": (6, 4)}
    return frozen(bottleneck(skip, order, act, memory, **shape, branch_scale=scale))


def check_frozen_block(backend: str, skip: Skip, memory: Memory, stride: int) -> None:
    """No y that is read by nobody is kept, and every gradient is PyTorch's. stride: of the second convolution."""
    case = frozen_bottleneck(skip, memory=memory, stride=stride)
    x, params, spec = case.build(torch.float32, torch.channels_last)
    kept = leaves(params, trains)
    # x 4, y_1 1, y_2 1; a plain chain keeps y_3, too, for the mask of its activation
    wanted = 4 + (stride == 1 or memory == "default") + 1 / stride**2
    if skip == "none" and memory == "default":
        wanted += 4 / stride**2
    assert units(x, kept, spec, backend) == wanted
    dout = case.upstream(torch.float32)
    got, expected = (gradients(x, params, spec, b, dout, trains) for b in (backend, "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def trains(name: str) -> bool:
    """Convolutions only, as where batch norms are frozen."""
    return "norm" not in name and "running" not in name


def units(x: Tensor, params: BlockParams, spec: BlockSpec, backend: str) -> float:
    """What forward keeps besides its parameters, buffers and output; x counts, as the output of the block before."""
    source = x.detach().requires_grad_() * 1
    small = [t for t in named_tensors(params).values() if not t.requires_grad]
    kept: list[Tensor] = []

    def run() -> None:
        kept.append(functional.residual_block(source, params, spec, backend=backend))

    total = saved_bytes(run, small)
    return (total - (facts(spec).join == "output") * kept[0].nbytes) / UNIT


def gradients(
    x: Tensor, params: BlockParams, spec: BlockSpec, backend: str, dout: Tensor, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    leaf, tensors = x.detach().requires_grad_(), leaves(params, wanted)
    inputs = {"x": leaf} | {n: t for n, t in named_tensors(tensors).items() if t.requires_grad}
    out = functional.residual_block(leaf, tensors, spec, backend=backend)
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), dout), strict=True))
