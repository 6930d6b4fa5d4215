"""A block with a gate in parts that the fused operators have: its chain, its projection, and the join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.ops import gated_join, join_operators, operators, reference, running_stats
from resnet_fused.ops.gate import Gate, LayeredGate, per_channel
from resnet_fused.ops.join_operators import JoinNorm
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import Activation, BlockSpec, StageSpec
from resnet_fused.spec.activations import IDENTITY

Block = tuple[BlockParams, BlockSpec]


class Parts(NamedTuple):
    """chain: from x to what the join reads; where `norm` is given, its norm is left to the join.

    evaluated:  the chain with every norm, for evaluation, which folds it.
    projection: the skip path as a chain of its own, or None.
    norm:       the last stage with its tensors, where the join normalises.
    act, slope: what follows the addition.
    """

    chain: Block
    evaluated: Block
    projection: Block | None
    norm: tuple[StageSpec, StageParams] | None
    act: Activation
    slope: Tensor | None


def reason_against(spec: BlockSpec) -> str | None:
    """Why a block with a gate has no such parts, or None."""
    if spec.order == "pre" and spec.skip == "projection":
        return "the projection of a pre-activation block reads what the branch's first norm gives"
    return None


def chosen_for(params: BlockParams, spec: BlockSpec, gate: Gate | None) -> Block:
    """What a backend is chosen for: the block, or with a gate its chain."""
    return (params, spec) if gate is None or reason_against(spec) else parts(params, spec).evaluated


def parts(params: BlockParams, spec: BlockSpec) -> Parts:
    """Kept with params, but by graphs that are traced."""
    if torch.compiler.is_compiling():
        return _parts(params, spec)
    kept = params.kept.gated
    if kept is None or kept[0] is not spec:
        kept = params.kept.gated = (spec, _parts(params, spec))
    return kept[1]


def _parts(params: BlockParams, spec: BlockSpec) -> Parts:
    last, tensors = spec.stages[-1], params.stages[-1]

    def chain(end: StageSpec, tensors: StageParams) -> Block:
        stages = (*spec.stages[:-1], end)
        return BlockParams((*params.stages[:-1], tensors)), BlockSpec(
            stages, order="pre" if spec.order == "pre" else "post", memory=spec.memory
        )

    if spec.order == "post":
        evaluated = chain(replace(last, act=IDENTITY), replace(tensors, slope=None))
        act, slope = last.activation, tensors.slope
    else:
        evaluated, act, slope = chain(last, tensors), IDENTITY, None
    norm, bare = None, evaluated
    if spec.order == "post" and last.norm:
        norm = last, tensors
        bare = chain(replace(last, norm=False, act=IDENTITY), tensors.convolution)
    projection = None
    if spec.projection is not None and params.projection is not None:
        projection = BlockParams((params.projection,)), BlockSpec((spec.projection,), memory=spec.memory)
    return Parts(bare, evaluated, projection, norm, act, slope)


def has_join(x: Tensor) -> bool:
    """Whether the join has kernels where x is; they are csrc/cpu's."""
    return x.device.type == "cpu" and operators.load_error() is None


def notes(x: Tensor, gate: Gate, evaluates: bool) -> list[str]:
    """Where the gate runs behind a fused chain, in words."""
    if not has_join(x):
        return ["the gate and the addition behind it are PyTorch's own operations"]
    if not evaluates or not callable(gate):
        return []
    if isinstance(gate, LayeredGate):
        return ["the gate's mean, layers and product are one call"]
    return ["the gate's layers are PyTorch's own operations, between one pass for its mean and one for the product"]


def join(
    y: Tensor, skip: Tensor | None, params: BlockParams, parts: Parts, gate: Gate | None, normalises: bool
) -> Tensor:
    """act(branch_scale * gate * norm(y) + skip_scale * skip), channels_last; updates the norm's running statistics.

    normalises: `parts.norm` is applied here; otherwise y has been through every norm.
    """
    stage, tensors = parts.norm if normalises and parts.norm is not None else (None, None)
    norm = JoinNorm() if stage is None or tensors is None else _norm(stage, tensors)
    y, pooled, handoff, norm = gated_join.pooled_norm(y, norm, callable(gate))
    if gate is None:
        gate = y.new_ones(1, 1)
    factor = per_channel(gate(pooled) if callable(gate) else gate, y)  # type: ignore[arg-type]
    if isinstance(params.branch_scale, Tensor):
        factor = factor * params.branch_scale.reshape(1, -1)
    elif params.branch_scale != 1.0:
        factor = factor * params.branch_scale
    if skip is not None:
        skip = reference.scaled(skip, params.skip_scale)
        skip = skip.contiguous(memory_format=torch.channels_last)
    # before the join, where checkpointing, which computes all this again, stops: its last tensor is saved there
    if norm.of_batch:
        assert tensors is not None and norm.mean is not None and norm.var is not None
        running_stats.update_one(tensors, norm.mean, norm.var, y.numel() // y.shape[1])
        running_stats.count_one(tensors)
    return gated_join.gated_join(y, factor, skip, parts.slope, handoff, norm, parts.act)


def only_multiplies(params: BlockParams, spec: BlockSpec, parts: Parts) -> bool:
    """Whether the join is a bare product that may overwrite the chain's result, as in evaluation without autograd."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or parts.act != IDENTITY or spec.skip != "none":
        return False
    return not isinstance(params.branch_scale, Tensor) and params.branch_scale == 1.0


def multiplied(y: Tensor, gate: Gate) -> Tensor:
    """gate * y, in y's memory."""
    return y.mul_(per_channel(gate(_pooled(y)) if callable(gate) else gate, y)[:, :, None, None])


def reads_layers(y: Tensor, params: BlockParams, gate: LayeredGate) -> bool:
    """Whether `evaluated` may take the place of `join`: without autograd, and no scale beside the gate's."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(y) is not Tensor or not gate.reads(y):
        return False
    return not any(isinstance(scale, Tensor) or scale != 1.0 for scale in (params.branch_scale, params.skip_scale))


def evaluated(y: Tensor, skip: Tensor | None, parts: Parts, gate: LayeredGate) -> Tensor:
    """`join` with the gate's layers in the same call, in y's memory if that is channels_last."""
    y = y.contiguous(memory_format=torch.channels_last)
    join_operators.gate_(y, skip, gate.layers, parts.act, parts.slope)
    return y


def _pooled(y: Tensor) -> Tensor:
    """The mean of each channel of each image; of 16 bits ATen first makes a float32 copy, the statistics do not."""
    return join_operators.pooled_statistics(y, JoinNorm(), pools=True)[2] if y.dtype.itemsize == 2 else y.mean((2, 3))


def norm_act(x: Tensor, norm: JoinNorm, residual: Tensor | None, act: Activation, blend: Callable[[], None]) -> Tensor:
    """act(norm(x) + residual) in x's memory format: a join whose gate is one. blend: called before the join."""
    form = suggest_memory_format(x)
    y, _, handoff = gated_join.PooledNorm.apply(
        x.contiguous(memory_format=torch.channels_last), norm.weight, norm.bias, norm, None, None
    )
    blend()
    one = torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
    return gated_join.gated_join(y, one, residual, None, handoff, norm, act).contiguous(memory_format=form)


def _norm(stage: StageSpec, tensors: StageParams) -> JoinNorm:
    """That of the join; the batch's statistics are not known yet."""
    constants = (None, None) if stage.batch_stats else (tensors.running_mean, tensors.running_var)
    return JoinNorm(*constants, tensors.norm_weight, tensors.norm_bias, stage.eps, stage.batch_stats)
