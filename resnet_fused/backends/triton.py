"""The Triton backend: triton_kernels/ for CUDA tensors, and for CPU tensors under Triton's interpreter.

Its kernels are the `triton` overloads of the operators, registered here; Triton itself is loaded by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from resnet_fused import triton_kernels
from resnet_fused.backends import folding, how, measured
from resnet_fused.backends.how import Way
from resnet_fused.ops import autograd, operators, validation
from resnet_fused.ops.operators import TensorList
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import BlockSpec

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

    def forward(
        self, spec: BlockSpec, tensors: TensorList, needs: list[bool]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return operators.residual_block_forward(spec, tensors, needs, "triton")

    def backward(
        self,
        spec: BlockSpec,
        dout: Tensor,
        out: Tensor | None,
        conv_outputs: list[Tensor],
        batch_stats: list[Tensor],
        tensors: TensorList,
        needs: list[bool],
    ) -> list[Tensor | None]:
        return operators.residual_block_backward(spec, dout, out, conv_outputs, batch_stats, tensors, needs, "triton")

    def infer(self, x: Tensor, params: BlockParams, spec: BlockSpec) -> Tensor | None:
        folded = folding.folded(params, x, spec, pack=False)
        if not folded.finite:
            return None
        return operators.residual_block_infer(
            x, folded.pre, folded.weights, folded.biases, folded.skip_scale, spec, "triton"
        )


@torch.compiler.assume_constant_result
def _why_not(device: torch.device | None = None) -> str | None:
    return triton_kernels.why_not(device)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return triton_kernels.interpreted()


# --- the operators' kernels ------------------------------------------------------------------------------------------

OptionalList = Sequence[Tensor | None]


@lru_cache(maxsize=1024)
def _spec(ints: tuple[int, ...], eps: tuple[float, ...]) -> BlockSpec:
    return operators.decode(ints, eps)


def _flat(x: Tensor, branch: Tensor | None, skip: Tensor | None, *lists: OptionalList) -> TensorList:
    return (x, branch, skip, *(t for six in zip(*lists, strict=True) for t in six))


def _check(
    spec: BlockSpec, x: Tensor, branch: Tensor | None, skip: Tensor | None, *lists: OptionalList
) -> list[tuple[int, int, int]]:
    """`validation.check` for who calls the operator itself: a kernel given wrong shapes would read out of bounds."""
    if any(len(each) != len(spec.convs) for each in lists):
        raise ValueError(f"the spec has {len(spec.convs)} convolutions, got {[len(each) for each in lists]} tensors")
    stages = tuple(StageParams(*six) for six in zip(*lists, strict=True))
    projection = stages[-1] if spec.projection is not None else None
    scales = (1.0 if branch is None else branch, 1.0 if skip is None else skip)
    return validation.check(x, BlockParams(stages[: len(spec.stages)], projection, *scales), spec)


def _check_saved(x: Tensor, shape: tuple[int, int, int], tensors: Sequence[Tensor | None], what: str) -> None:
    for t in tensors:
        if t is None or tuple(t.shape) != (x.shape[0], *shape) or t.dtype != x.dtype or t.device != x.device:
            given = "None" if t is None else f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise ValueError(f"{what} must be {x.dtype} {(x.shape[0], *shape)} on {x.device}, got {given}")


def _forward(
    x: Tensor,
    branch: Tensor | None,
    skip: Tensor | None,
    weights: Sequence[Tensor],
    biases: OptionalList,
    gammas: OptionalList,
    betas: OptionalList,
    means: OptionalList,
    variances: OptionalList,
    needs: Sequence[bool],
    ints: Sequence[int],
    eps: Sequence[float],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from resnet_fused.triton_kernels.host import policies, residual_block

    spec = _spec(tuple(ints), tuple(eps))
    _check(spec, x, branch, skip, weights, biases, gammas, betas, means, variances)
    tensors = _flat(x, branch, skip, weights, biases, gammas, betas, means, variances)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors' is
        return residual_block.forward(spec, tensors, needs, policies.choose(spec, x, weights))


def _backward(
    dout: Tensor,
    out: Tensor | None,
    ys: Sequence[Tensor],
    stats: Sequence[Tensor],
    x: Tensor,
    branch: Tensor | None,
    skip: Tensor | None,
    weights: Sequence[Tensor],
    biases: OptionalList,
    gammas: OptionalList,
    betas: OptionalList,
    means: OptionalList,
    variances: OptionalList,
    needs: Sequence[bool],
    ints: Sequence[int],
    eps: Sequence[float],
) -> list[Tensor]:
    from resnet_fused.triton_kernels.host import policies, residual_block

    spec = _spec(tuple(ints), tuple(eps))
    shapes = _check(spec, x, branch, skip, weights, biases, gammas, betas, means, variances)
    masked = spec.order == "post" and spec.skip != "none" and spec.stages[-1].act == "relu"
    _check_saved(x, shapes[len(spec.stages) - 1], [dout, *([out] if masked else [])], "dout and out")
    for i, y in zip(operators.saved_convs(spec, needs), ys, strict=True):
        _check_saved(x, shapes[i], [y], f"the saved output of convolution {i}")
    tensors = _flat(x, branch, skip, weights, biases, gammas, betas, means, variances)
    with torch.cuda.device_of(x):
        policy = policies.choose(spec, x, weights)
        grads = residual_block.backward(spec, dout, out, ys, stats, tensors, needs, policy)
    return [g for g in grads if g is not None]


def _infer(
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    weights: Sequence[Tensor],
    biases: OptionalList,
    skip_scale: Tensor | None,
    ints: Sequence[int],
) -> Tensor:
    from resnet_fused.triton_kernels.host import policies, residual_block

    spec = _spec(tuple(ints), ())
    nothing = [None] * len(weights)
    _check(residual_block.folded_spec(spec, False), x, None, skip_scale, weights, biases, *[nothing] * 4)
    pre = None if a is None or b is None else torch.stack([a, b, torch.zeros_like(a), b]).float()  # NORM_ROWS
    with torch.cuda.device_of(x):
        policy = policies.choose(spec, x, weights, train=False)
        return residual_block.infer(x, pre, weights, biases, skip_scale, spec, policy)


if operators.load_error() is None:
    _library = torch.library.Library("resnet_fused", "IMPL")  # the registrations live as long as this
    for _key in ("CUDA", "CPU"):
        _library.impl("residual_block_forward.triton", _forward, _key)
        _library.impl("residual_block_backward.triton", _backward, _key)
        _library.impl("residual_block_infer.triton", _infer, _key)
