"""Evaluation folds each normalisation into its convolution; the result is kept until a tensor changes.

    norm(conv(x, w, c)) = conv(x, w * a) + (c * a + b),   a = gamma / sqrt(var + eps),   b = beta - mean * a

The cache hangs on the first convolution's weight and holds while every tensor involved is the same object, at the
same address and version counter, so optimizer steps, `load_state_dict` and `.to()` are seen. Writing through
``tensor.data`` is not: call `forget` then (a fused module does when it changes between training and evaluation).

Where oneDNN will run them, the weights are also brought into its blocked layout, once instead of at every call.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import BlockSpec, StageSpec

Affine = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FoldedBlock:
    """What `operators.residual_block_infer` takes: weights and biases in x's dtype, the rest in at least float32."""

    weights: list[Tensor]  # opaque where packed
    biases: list[Tensor | None]
    pre: Affine | None
    skip_scale: Tensor | None
    channels_last: bool  # of the first weight before packing


_cache: Any = WeakIdKeyDictionary()


def forget(weight: Tensor) -> None:
    """Drop what was folded for the block whose first convolution weight this is."""
    _cache.pop(weight, None)


def folded(source: BlockParams, x: Tensor, spec: BlockSpec, pack: bool = True) -> FoldedBlock:
    """The block's tensors with every foldable normalisation and scale folded in, for inputs like x.

    source: the parameters as the caller owns them, not copies cast for one call: they carry the version counters.
    pack: into oneDNN's layout, where it will run them.
    """
    packs = pack and _packs(x)
    tensors = _tensors(source)
    if any(t.is_inference() for t in tensors):  # no version counter: nothing to hold the cache against
        return _fold(source, x, spec, packs)
    floats = tuple(s for s in (source.branch_scale, source.skip_scale) if not isinstance(s, Tensor))
    key = (spec, x.dtype, packs, floats, tuple((t.data_ptr(), t._version) for t in tensors))
    anchor = source.convs[0].weight
    hit = _cache.get(anchor)
    # The objects are compared too, through weak references: a new tensor may live at a dead one's address.
    if hit is not None and hit[0] == key and all(r() is t for r, t in zip(hit[1], tensors, strict=True)):
        return hit[2]
    result = _fold(source, x, spec, packs)
    _cache[anchor] = (key, tuple(map(weakref.ref, tensors)), result)
    return result


def _tensors(params: BlockParams) -> list[Tensor]:
    """Every tensor that folding reads."""
    candidates: list[Scale | None] = [params.branch_scale, params.skip_scale]
    for p in params.convs:
        candidates += [p.weight, p.bias, p.norm_weight, p.norm_bias, p.running_mean, p.running_var]
    return [t for t in candidates if isinstance(t, Tensor)]


@torch.no_grad()
def _fold(params: BlockParams, x: Tensor, spec: BlockSpec, packs: bool) -> FoldedBlock:
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = [_affine(s, p, precision) for s, p in zip(spec.convs, params.convs, strict=True)]
    pre = None
    if spec.order == "pre":  # each convolution is followed by the next stage's norm, the last by none
        pre, *norms = norms[: len(spec.stages)]
        norms += [None] * (len(spec.convs) - len(norms))
    weights, biases = [], []
    for i, (p, norm) in enumerate(zip(params.convs, norms, strict=True)):
        scale: Scale = 1.0
        if i >= len(spec.stages) - 1:
            scale = params.branch_scale if i == len(spec.stages) - 1 else params.skip_scale
        w, c = _fold_conv(p, norm, scale, precision)
        weights.append(w.to(x.dtype))
        biases.append(None if c is None else c.to(x.dtype))
    channels_last = suggest_memory_format(weights[0]) == torch.channels_last
    if packs:
        weights = _pack(weights, x, spec)
    skip_scale = None
    if spec.skip == "identity" and not (isinstance(params.skip_scale, float) and params.skip_scale == 1.0):
        skip_scale = torch.as_tensor(params.skip_scale, dtype=precision, device=x.device).detach().reshape(-1)
    return FoldedBlock(weights, biases, pre, skip_scale, channels_last)


def _affine(stage: StageSpec, p: StageParams, precision: torch.dtype) -> Affine | None:
    if not stage.norm:
        return None
    assert p.running_mean is not None and p.running_var is not None  # validation has seen to it
    a = torch.rsqrt(p.running_var.to(precision) + stage.eps)
    if p.norm_weight is not None:
        a = a * p.norm_weight.to(precision)
    b = -p.running_mean.to(precision) * a
    return a, b if p.norm_bias is None else b + p.norm_bias.to(precision)


def _fold_conv(
    p: StageParams, norm: Affine | None, scale: Scale, precision: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    w, c = p.weight.to(precision), None if p.bias is None else p.bias.to(precision)
    if norm is not None:
        a, b = norm
        w, c = w * a.view(-1, 1, 1, 1), b if c is None else c * a + b
    if isinstance(scale, Tensor) or scale != 1.0:
        s = torch.as_tensor(scale, dtype=precision, device=w.device).reshape(-1)
        w, c = w * s.view(-1, 1, 1, 1), None if c is None else c * s
    return w, c


def _packs(x: Tensor) -> bool:
    """Whether oneDNN runs convolutions of x; csrc/cpu/convolution.cpp (`has_post_ops`) asks the same."""
    if not (x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if x.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return x.dtype == torch.float32


def _pack(weights: list[Tensor], x: Tensor, spec: BlockSpec) -> list[Tensor]:
    """The weights in the layout that oneDNN prefers for inputs of x's size; other sizes work, with a reorder."""
    packed, shape = [], list(x.shape)
    for i, (stage, weight) in enumerate(zip(spec.convs, weights, strict=True)):
        source = list(x.shape) if i == len(spec.stages) else shape
        stride, padding, dilation = stage.geometry
        packed.append(
            torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, stage.groups, source)
        )
        height, width = stage.output_size((source[2], source[3]), (weight.shape[2], weight.shape[3]))
        shape = [x.shape[0], weight.shape[0], height, width]
    return packed
