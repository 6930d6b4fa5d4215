"""A block in pieces, where a norm cannot stand inside the fused operator: a chain, the norm, the next chain, ... .

A norm stands apart
- where its statistics are those of several processes (nn.SyncBatchNorm in training): they travel between two passes;
- at the block's end under autocast, where its result is wider than the convolutions (FrozenBatchNorm2d): what is added
  and returned is float32 there, while the convolutions before it stay 16 bits wide.

Each norm apart is one pass with the activation behind it, and the last with the addition (`ops.norm_act`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops import reference
from resnet_fused.ops.gate import Gate
from resnet_fused.ops.norm_act import norm_act
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import Activation, BlockSpec, StageSpec
from resnet_fused.spec.activations import IDENTITY, RELU
from resnet_fused.spec.batch_norm import BatchNorm

Fused = Callable[[Tensor, BlockParams, BlockSpec], Tensor]


def reason_to_split(params: BlockParams, spec: BlockSpec, narrows: Callable[[], bool]) -> str | None:
    """Why the block is computed in pieces now, or None.

    narrows: whether autocast gives the convolutions a narrower dtype than float32; asked where it matters.
    """
    if params.shares_batch:
        return (
            "SyncBatchNorm shares its statistics between processes: one operator for each convolution, one pass for "
            "each norm with its activation (and the addition)"
        )
    promotes = spec.stages[-1].promotes or (spec.projection is not None and spec.projection.promotes)
    if promotes and spec.order != "pre" and narrows():
        return (
            "under autocast FrozenBatchNorm2d's result is float32: the chain is fused in autocast's dtype; the last "
            "norm, the addition and the activation are one float32 pass"
        )
    return None


class Piece(NamedTuple):
    """`chain` ends in a convolution without norm and activation, which are those of `stage`."""

    chain: tuple[BlockParams, BlockSpec]
    stage: StageSpec
    tensors: StageParams


class Pieces(NamedTuple):
    chain: list[Piece]
    projection: Piece | None


def run(
    x: Tensor,
    params: BlockParams,
    spec: BlockSpec,
    gate: Gate | None,
    residual: Tensor | None,
    fused: Fused,
    dtype: torch.dtype,
) -> Tensor:
    """The block of `spec`, as `reference.residual_block`.

    fused: runs a chain. dtype: that of the convolutions.
    """
    pieces = _pieces(params, spec)
    last = pieces.chain[-1]
    u = narrow = x.to(dtype)  # once for both paths, so that backward keeps one copy
    source = narrow
    if spec.order == "pre":
        for i, piece in enumerate(pieces.chain):
            u = _norm_act(x if i == 0 else u, piece, None)
            source = u if i == 0 else source
            u = fused(u, *piece.chain)
    else:
        for piece in pieces.chain[:-1]:
            u = _norm_act(fused(u, *piece.chain), piece, None)
        u = fused(u, *last.chain)
    skip = residual if spec.skip == "none" else x
    if pieces.projection is not None:
        skip = fused(source, *pieces.projection.chain)
        if spec.order != "pre":
            skip = _norm_act(skip, pieces.projection, None)
    if spec.order == "pre":
        out = reference.join(u, skip, params, spec, gate)
    elif spec.order == "branch":
        out = reference.join(_norm_act(u, last, None), skip, params, spec, gate)
    else:
        out = _end(u, skip, last, params, spec, gate)
    return out


def _end(
    y: Tensor,
    skip: Tensor | None,
    last: Piece,
    params: BlockParams,
    spec: BlockSpec,
    gate: Gate | None,
) -> Tensor:
    """act(branch_scale * gate * norm(y) + skip_scale * skip): one pass where nothing but norm and skip are added."""
    plain = gate is None and not isinstance(params.branch_scale, Tensor) and params.branch_scale == 1.0
    if plain and last.stage.norm:
        if skip is None:
            return _norm_act(y, last, None)
        result = _normed_dtype(y, last)
        if spec.in_place_add or torch.promote_types(result, skip.dtype) == result:
            return _norm_act(y, last, reference.scaled(skip, params.skip_scale).to(result))
    bare = last._replace(stage=replace(last.stage, act=IDENTITY))
    joined = reference.join(_norm_act(y, bare, None), skip, params, spec, gate)
    return last.stage.activation(joined, last.tensors.slope)


def _normed_dtype(y: Tensor, piece: Piece) -> torch.dtype:
    mean = piece.tensors.running_mean
    promotes = piece.stage.promotes and mean is not None
    return torch.promote_types(y.dtype, mean.dtype) if promotes else y.dtype  # type: ignore[union-attr]


def _norm_act(y: Tensor, piece: Piece, residual: Tensor | None) -> Tensor:
    stage, tensors = piece.stage, piece.tensors
    act: Activation = stage.activation
    if not stage.norm:
        return act(y if residual is None else y + residual, tensors.slope)
    y = y.to(_normed_dtype(y, piece))
    norm = BatchNorm(
        tensors.norm_weight,
        tensors.norm_bias,
        tensors.running_mean,
        tensors.running_var,
        tensors.num_batches_tracked,
        tensors.momentum,
        stage.eps,
        stage.batch_stats,
        y.shape[1],
        tensors.processes,
    )
    if y.numel() == 0 and norm.group is None:  # PyTorch's behaviour to keep
        z = reference.norm(stage, tensors, y)
        return act(z if residual is None else z + residual, tensors.slope)
    in_pass = act in (IDENTITY, RELU)
    out = norm_act(y, norm, residual, act if in_pass else IDENTITY)
    return out if in_pass else act(out, tensors.slope)


def _pieces(params: BlockParams, spec: BlockSpec) -> Pieces:
    """Kept with params, but by graphs that are traced."""
    if torch.compiler.is_compiling():
        return _split(params, spec)
    kept = params.kept.pieces
    if kept is None or kept[0] is not spec:
        kept = params.kept.pieces = (spec, _split(params, spec))
    return kept[1]


def _split(params: BlockParams, spec: BlockSpec) -> Pieces:
    """In pre-activation order every convolution alone, otherwise up to each shared norm and to the end."""
    chain: list[Piece] = []
    start = 0
    for i, tensors in enumerate(params.stages):
        if i == len(spec.stages) - 1 or spec.order == "pre" or tensors.processes is not None:
            chain.append(_piece(spec, params, start, i))
            start = i + 1
    projection = None
    if spec.projection is not None and params.projection is not None:
        alone = BlockParams((params.projection,)), BlockSpec((spec.projection,), memory=spec.memory)
        projection = _piece(alone[1], alone[0], 0, 0)
    return Pieces(chain, projection)


def _piece(spec: BlockSpec, params: BlockParams, start: int, end: int) -> Piece:
    stage, tensors = spec.stages[end], params.stages[end]
    bare = replace(stage, norm=False, batch_stats=False, act=IDENTITY, promotes=False)
    stages = (*spec.stages[start:end], bare)
    of_stages = (*params.stages[start:end], StageParams(tensors.weight, tensors.bias))
    return Piece((BlockParams(of_stages), BlockSpec(stages, memory=spec.memory)), stage, tensors)
