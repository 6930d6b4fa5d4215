"""What the operators of residual blocks are called with, from a block's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.blocks import Case, block, frozen
from torch import Tensor

from resnet_fused.backends.how import CHOSEN, How
from resnet_fused.ops import autograd, operators
from resnet_fused.ops.encoding import encode
from resnet_fused.ops.operators import Tensors
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import Needs, facts
from resnet_fused.spec.tensors import BlockTensors

Arguments = tuple[object, ...]

CASES = {
    "bottleneck": block(3, "projection", channels=4, out_channels=6, stride=2, size=(7, 6)),
    "basic block": block(2, channels=5, width=3),
    "stem": block(1, "none", kernel=3, channels=3, out_channels=5),
    "pre-activation": block(2, "projection", order="pre", channels=4, out_channels=6, branch_scale="[C]"),
    "pre-activation, identity": block(2, order="pre", channels=4, skip_scale="0-d"),
    "low memory": block(3, channels=4, memory="low", branch_scale="[C,1,1]", bias=True),
    "low memory, strides": block(3, "projection", channels=4, memory="low", stride=2, strides_at=1, bias=True),
    "frozen": block(2, "projection", batch_stats=False, bias=True),
    "no norm": block(2, norm=False),
    "grouped": block(2, channels=4, width=4, groups=2),
}


def arguments(name: str, case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> Arguments:
    if name == "residual_block_evaluate":
        return evaluate_arguments(*frozen(case).build(dtype, memory_format))
    x, params, spec = case.build(dtype, memory_format)
    if name == "residual_block_forward":
        return forward_arguments(x, params, spec)
    if name == "residual_block_infer":
        return infer_arguments(x, params, spec)
    dout = case.upstream(dtype).contiguous(memory_format=memory_format)
    return backward_arguments(x, params, spec, dout, [True] * tensors_in(spec))


def forward_arguments(x: Tensor, params: BlockParams, spec: BlockSpec) -> Arguments:
    tensors = autograd.tensors_of(params, x)
    return (*tensors.arguments, *encode(spec, every_gradient(tensors)))


def backward_arguments(
    x: Tensor, params: BlockParams, spec: BlockSpec, dout: Tensor, needs: Sequence[bool], how: How = CHOSEN
) -> Arguments:
    """needs: in the order of `BlockTensors.flat`; of what has no gradient it is not asked for."""
    tensors = autograd.tensors_of(params, x)
    possible = every_gradient(tensors).flat
    wanted = BlockTensors.of([need and can for need, can in zip(needs, possible, strict=True)])
    out, saved, stats = operators.residual_block_forward(spec, tensors, wanted)
    kept = out if facts(spec).join == "output" else None
    return (dout, kept, saved, stats, *tensors.arguments, wanted.flat, *encode(spec, wanted, how))


def evaluate_arguments(x: Tensor, params: BlockParams, spec: BlockSpec, pool: Sequence[int] = ()) -> Arguments:
    return (*autograd.tensors_of(params, x).arguments, *encode(spec), list(pool))


def every_gradient(tensors: Tensors) -> Needs:
    """All that there are: of everything but the running statistics."""
    needs = tensors.map(lambda t: t is not None)
    needs.running_means = needs.running_vars = [False] * len(needs.weights)
    return needs


def tensors_in(spec: BlockSpec) -> int:
    """How many a block has, absent ones included."""
    return len(BlockTensors.filled(None, len(spec.convs)).flat)


def infer_arguments(x: Tensor, params: BlockParams, spec: BlockSpec) -> Arguments:
    """Any weights do here: what they mean is tested in test_inference.py."""
    pre = (torch.rand_like(x[0, :, 0, 0]),) * 2 if spec.order == "pre" and spec.stages[0].norm else (None, None)
    weights = [p.weight for p in params.convs]
    biases = [torch.rand_like(w[:, 0, 0, 0]) if i % 2 else None for i, w in enumerate(weights)]
    scale = torch.rand(weights[len(spec.stages) - 1].shape[0], dtype=x.dtype) if spec.skip == "identity" else None
    slopes = [p.slope for p in params.convs]
    branch_scale = torch.rand((), dtype=x.dtype) if facts(spec).join == "branch" else None
    return (x, *pre, weights, biases, branch_scale, scale, slopes, None, *encode(spec))
