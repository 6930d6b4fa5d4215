"""The Triton backend: triton_kernels/ for CUDA tensors, and for CPU tensors under Triton's interpreter.

Its kernels are the `triton` overloads of the operators, registered here; Triton itself is loaded by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import triton_kernels
from resnet_fused.backends import folding, how, measured
from resnet_fused.backends.how import Way
from resnet_fused.ops import autograd, operators, validation
from resnet_fused.ops.encoding import decode
from resnet_fused.ops.operators import Tensors
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import Needs
from resnet_fused.spec.tensors import SINGLE, BlockTensors, convolution_places

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_IMAGE, LARGEST_BATCH = 1 << 29, 1 << 30  # values of one image in the widest activation; pixels


class TritonBackend:
    name = "triton"

    def unavailable(self) -> str | None:
        return operators.load_error() or _why_not()

    def unsupported(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        reason = _why_not(x.device)
        if reason is not None:
            return reason
        if x.dtype not in DTYPES:
            return f"Triton kernels compute in float32 and narrower, x is {x.dtype}"
        refusal = how.refuses_padding("Triton kernels", spec)
        if refusal is not None:
            return refusal
        pixels, channels = x.shape[2] * x.shape[3], max(x.shape[1], *(p.weight.shape[0] for p in params.convs))
        if pixels * channels > LARGEST_IMAGE or x.shape[0] * pixels > LARGEST_BATCH:
            return f"Triton kernels count pixels and an image's values in 32 bits, x is {tuple(x.shape)}"
        return None

    def declines(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
        if _interpreted():
            return "Triton's interpreter is for tests"
        weights = [p.weight for p in params.convs]
        return measured.declines("triton", measured.lookup(spec, x, weights, autograd.trains(spec, x, params)))

    def ways(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> list[Way]:
        return how.ways([p.weight for p in params.convs])

    def forward(self, spec: BlockSpec, tensors: Tensors, needs: Needs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return operators.residual_block_forward(spec, tensors, needs, "triton")

    def backward(
        self,
        spec: BlockSpec,
        dout: Tensor,
        out: Tensor | None,
        conv_outputs: list[Tensor],
        batch_stats: list[Tensor],
        tensors: Tensors,
        needs: Needs,
        master: torch.dtype | None = None,
    ) -> Tensors:
        return operators.residual_block_backward(
            spec, dout, out, conv_outputs, batch_stats, tensors, needs, "triton", master=master
        )

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor | None:
        folded = folding.folded(params, x, spec, pack=False)
        if not folded.finite:
            return None
        return operators.residual_block_infer(
            x,
            folded.pre,
            folded.weights,
            folded.biases,
            folded.skip_scale,
            [p.slope for p in params.convs],
            spec,
            folded.branch_scale,
            "triton",
        )


@torch.compiler.assume_constant_result
def _why_not(device: torch.device | None = None) -> str | None:
    return triton_kernels.why_not(device)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return triton_kernels.interpreted()


# --- the operators' kernels ------------------------------------------------------------------------------------------


def _check(spec: BlockSpec, tensors: Tensors) -> list[tuple[int, int, int]]:
    """`validation.check` for callers of the operator itself: a kernel given wrong shapes would read out of bounds."""
    refusal = how.refuses_padding("Triton kernels", spec)
    if refusal is not None:
        raise ValueError(refusal)
    lists: Any = tensors.arguments[len(SINGLE) :]
    if any(len(each) != len(spec.convs) for each in lists):
        raise ValueError(f"the spec has {len(spec.convs)} convolutions, got {[len(each) for each in lists]} tensors")
    stages = tuple(
        StageParams(weight, bias, gamma, beta, mean, var, slope=slope)
        for weight, bias, gamma, beta, mean, var, slope in zip(*lists, strict=True)
    )
    projection = stages[-1] if spec.projection is not None else None
    branch, skip = tensors.branch_scale, tensors.skip_scale
    scales = (1.0 if branch is None else branch, 1.0 if skip is None else skip)
    assert tensors.x is not None
    return validation.check(tensors.x, BlockParams(stages[: len(spec.stages)], projection, *scales), spec)


def _check_like(x: Tensor, shape: tuple[int, int, int], tensor: Tensor | None, what: str) -> None:
    accepted = (x.shape[0], *shape)
    if tensor is None or tuple(tensor.shape) != accepted or tensor.dtype != x.dtype or tensor.device != x.device:
        given = "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{what} must be {x.dtype} {accepted} on {x.device}, got {given}")


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from resnet_fused.triton_kernels.host import forward, policies

    *others, ints, floats = rest
    spec, facts = decode(ints, floats)
    tensors: Tensors = BlockTensors(x, *others)
    _check(spec, tensors)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors' is
        return forward.forward(spec, facts, tensors, policies.choose(spec, x, others[2]))


def _backward(
    dout: Tensor,
    out: Tensor | None,
    conv_outputs: Sequence[Tensor],
    batch_stats: Sequence[Tensor],
    x: Tensor,
    *rest: Any,
    master: torch.dtype | None = None,
) -> list[Tensor]:
    from resnet_fused.triton_kernels.host import backward, policies

    *others, flags, ints, floats = rest
    spec, facts = decode(ints, floats)
    tensors: Tensors = BlockTensors(x, *others)
    shapes = _check(spec, tensors)
    last = shapes[len(spec.stages) - 1]
    _check_like(x, last, dout, "dout")
    if facts.join == "output":
        _check_like(x, last, out, "out")
    for i, y in zip(facts.saved, conv_outputs, strict=True):
        _check_like(x, shapes[i], y, f"the saved output of convolution {i}")
    needs = BlockTensors.of(list(flags))
    with torch.cuda.device_of(x):
        policy = policies.choose(spec, x, others[2])
        grads = backward.backward(spec, facts, dout, out, conv_outputs, batch_stats, tensors, needs, policy)
    convs = convolution_places(len(spec.convs))
    return [
        grad if master is None or place not in convs else grad.to(master)
        for place, grad in enumerate(grads.flat)
        if grad is not None
    ]


def _infer(
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    branch_scale: Tensor | None,
    skip_scale: Tensor | None,
    slopes: list[Tensor | None],
    residual: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
) -> Tensor:
    from resnet_fused.triton_kernels.host import infer, policies

    if residual is not None:
        raise NotImplementedError("a residual in place of a skip path is added on the CPU only; add it behind")

    spec, facts = decode(ints, floats)
    nothing: list[Tensor | None] = [None] * len(weights)
    tensors: Tensors = BlockTensors(
        x, branch_scale, skip_scale, [*weights], biases, nothing, nothing, nothing, nothing, slopes
    )
    _check(infer.folded_spec(spec, False), tensors)
    if branch_scale is not None and spec.order != "branch":
        raise ValueError(f"branch_scale is folded into the weights of a block in {spec.order!r} order: give None")
    pre = None
    if a is not None and b is not None:
        for name, vector in (("pre_scale", a), ("pre_shift", b)):
            if vector.shape != (x.shape[1],) or vector.device != x.device:
                given = f"{list(vector.shape)} on {vector.device}"
                raise ValueError(f"{name} must be [{x.shape[1]}] on {x.device}, got {given}")
        pre = torch.stack([a, b, torch.zeros_like(a), b]).float()  # NORM_ROWS
    with torch.cuda.device_of(x):
        policy = policies.choose(spec, x, weights, train=False)
        return infer.infer(spec, facts, x, pre, weights, biases, branch_scale, skip_scale, slopes, policy)


if operators.load_error() is None:
    _library = torch.library.Library("resnet_fused", "IMPL")  # the registrations live as long as this
    for _key in ("CUDA", "CPU"):
        _library.impl("residual_block_forward.triton", _forward, _key)
        _library.impl("residual_block_backward.triton", _backward, _key)
        _library.impl("residual_block_infer.triton", _infer, _key)
