"""Evaluation in a graph of torch.compile: one operator, which keeps folded weights from call to call as eager does.

    functional -> torch.ops.resnet_fused.residual_block_evaluate -> native.infer, native.infer_pooled

A graph holds the parameters' own tensors as inputs, so what is made of them cannot be part of it. What is kept hangs on
the first weight: it ends with it, and holds while the tensors' fingerprint does (`folding`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused.backends.native import NativeBackend
from resnet_fused.ops import autograd, operators, reference
from resnet_fused.ops.encoding import decode, encode
from resnet_fused.params import BlockParams, Kept, StageParams
from resnet_fused.spec import BlockSpec

SCHEMA = (
    "residual_block_evaluate(Tensor x, Tensor? branch_scale, Tensor? skip_scale, Tensor[] weights, Tensor?[] biases, "
    "Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor?[] running_means, Tensor?[] running_vars, Tensor?[] slopes, "
    "int[] spec_ints, float[] spec_floats, int[] pool) -> Tensor"
)
_NATIVE = NativeBackend()
_kept = WeakIdKeyDictionary()  # first weight -> {what else it depends on: Kept}


def evaluate(x: Tensor, params: BlockParams, spec: BlockSpec, pool: Sequence[int] = ()) -> Tensor:
    """The block with running statistics and without autograd, and max pooling (kernel, stride, padding) behind it.

    params: as their owner holds them, before autocast; float scales are 1.
    """
    tensors = autograd.tensors_of(params, x)
    return torch.ops.resnet_fused.residual_block_evaluate.default(*tensors.arguments, *encode(spec), list(pool))


def _evaluate(
    x: Tensor,
    branch_scale: Tensor | None,
    skip_scale: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None],
    running_means: list[Tensor | None],
    running_vars: list[Tensor | None],
    slopes: list[Tensor | None],
    ints: list[int],
    floats: list[float],
    pool: list[int],
) -> Tensor:
    spec, _ = decode(ints, floats)
    vectors = zip(weights, biases, norm_weights, norm_biases, running_means, running_vars, slopes, strict=True)
    convs = [StageParams(w, c, gamma, beta, mean, var, slope=slope) for w, c, gamma, beta, mean, var, slope in vectors]
    count = len(spec.stages)
    params = BlockParams(
        tuple(convs[:count]),
        convs[count] if len(convs) > count else None,
        1.0 if branch_scale is None else branch_scale,
        1.0 if skip_scale is None else skip_scale,
    )
    params.__dict__["_kept"] = _kept.setdefault(weights[0], {}).setdefault((spec, x.dtype, tuple(pool)), Kept())
    with torch.no_grad():
        out = _NATIVE.infer_pooled(x, params, spec, pool) if pool else None
        if out is not None:
            return out
        out = _NATIVE.infer(x, params, spec)
        if out is None:  # not finite, as in functional; a graph has cast x, and runs without autocast
            with _narrowed(x, weights[0]):
                out = reference.residual_block(x, params, spec)
        return operators.max_pool2d(out, *pool)[0] if pool else out


def _narrowed(x: Tensor, weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if x.dtype == weight.dtype else torch.autocast(x.device.type, x.dtype)


def _fake(x: Tensor, branch_scale: Any, skip_scale: Any, weights: list[Tensor], *rest: Any) -> Tensor:
    *_, ints, floats, pool = rest
    spec, _ = decode(ints, floats)
    shape = operators.output_shape(x, weights, spec)
    out = x.new_empty(shape).contiguous(memory_format=operators.result_format(x, weights, spec))
    return operators.pooled(out, *pool) if pool else out


if operators.load_error() is None:
    _library = torch.library.Library("resnet_fused", "FRAGMENT")  # the registrations live as long as this
    _library.define(SCHEMA)
    _library.impl("residual_block_evaluate", _evaluate, "CPU")
    torch.library.register_fake("resnet_fused::residual_block_evaluate", _fake, lib=_library)
