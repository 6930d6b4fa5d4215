"""Blocks made ready for the CPU's own engine (csrc/cpu/engine): evaluation without autograd.

Weights are packed once, straight from the parameters' dtype; norms, biases and scales are applied to the sums of the
products in float32. Only where a projection is summed with the last convolution are both norms' factors multiplied into
the weights. What is prepared is kept as `folding` keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from resnet_fused.backends import folding
from resnet_fused.backends.folding import Affine, affine, kept_or_made, unless_one
from resnet_fused.ops import operators
from resnet_fused.ops.encoding import encode
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import NONE, facts

SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType


class Reason(NamedTuple):
    """Holds for this very spec object; None: the engine runs it."""

    spec: BlockSpec
    reason: str | None


class Prepared(NamedTuple):
    """handle: a torch.classes.resnet_fused.PreparedBlock. finite: otherwise it must not run."""

    handle: Any
    finite: bool

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        """The block's result; None where PyTorch has to compute it (csrc/cpu/engine/prepared_block.h).

        residual: added in place of a skip path.
        """
        return operators.residual_block_prepared(x, self.handle, residual) if self.finite else None

    def describe(self, x: Tensor) -> str:
        """How inputs like x run."""
        images, _, height, width = x.shape
        return str(self.handle.describe(images, height, width))


def reason_against(x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
    """Why the engine does not run this block in evaluation, and oneDNN's convolutions do, or None."""
    if x.device.type != "cpu":
        return f"the engine computes CPU tensors, x is on {x.device}"
    if isinstance(x, FakeTensor):
        return "the engine reads values, and a fake tensor has none"
    known = params.kept.engine.get(x.dtype)
    if known is None or known.spec is not spec:
        weights = [p.weight for p in params.convs]
        reason = operators.engine_reason_against(spec, weights, x.dtype) or operators.engine_faster_elsewhere(
            spec, weights, x.dtype
        )
        known = params.kept.engine[x.dtype] = Reason(spec, reason)
    return known.reason


def prepared(source: BlockParams, x: Tensor, spec: BlockSpec, pool: Sequence[int] = ()) -> Prepared:
    """The block for inputs of x's dtype.

    source: the parameters as the caller owns them, not copies cast for one call.
    pool:   kernel, stride and padding of max pooling behind the block, or nothing.
    """
    key = ("prepared", x.dtype, tuple(pool))
    return kept_or_made(source, x, spec, key, lambda: _prepare(source, x, spec, pool))


def last(source: BlockParams, spec: BlockSpec, dtype: torch.dtype, pool: Sequence[int] = ()) -> Prepared | None:
    """What `prepared` gave at the last evaluation, if it was of this kind and the tensors are what they were."""
    return folding.kept(source, spec, ("prepared", dtype, tuple(pool)))


def together(blocks: list[Any], head: Any = None) -> Any:
    """Handles of blocks that follow one another, for `operators.residual_blocks_prepared`.

    head: of a pointwise convolution of the result's mean over all pixels.
    """
    return torch.classes.resnet_fused.PreparedBlocks(blocks, head)


@torch.no_grad()
def _prepare(params: BlockParams, x: Tensor, spec: BlockSpec, pool: Sequence[int]) -> Prepared:
    known, last = facts(spec), len(spec.stages) - 1
    norms = [affine(s, p, torch.float32) for s, p in zip(spec.convs, params.convs, strict=True)]
    behind = [
        _affine_behind(p, None if conv.output_stage == NONE else norms[conv.output_stage])
        for p, conv in zip(params.convs, known.convs, strict=True)
    ]
    if known.join != "branch":
        behind[last] = _times(behind[last], params.branch_scale)
    factors: list[Tensor | None] = [None] * len(behind)
    if spec.projection is not None:
        (a, b), (a_skip, b_skip) = behind[last], _times(behind[-1], params.skip_scale)
        factors[last], factors[-1] = a, a_skip
        behind[last] = torch.ones_like(a), b + b_skip
    pre = norms[0] if spec.order == "pre" else None
    encoded = encode(spec)
    handle = torch.classes.resnet_fused.PreparedBlock(
        [p.weight.detach() for p in params.convs],
        factors,
        [a for a, _ in behind],
        [b for _, b in behind],
        None if pre is None else pre[0],
        None if pre is None else pre[1],
        [None if p.slope is None else p.slope.detach() for p in params.convs],
        unless_one(params.branch_scale, x, torch.float32) if known.join == "branch" else None,
        unless_one(params.skip_scale, x, torch.float32) if spec.skip == "identity" else None,
        list(pool),
        encoded.ints,
        encoded.floats,
        SCALAR_TYPES[x.dtype],
    )
    return Prepared(handle, handle.finite())


def _affine_behind(p: StageParams, norm: Affine | None) -> Affine:
    """a and b of a y + b = norm(y + bias)."""
    channels = p.weight.shape[0]
    a, b = norm or (p.weight.new_ones(channels, dtype=torch.float32), p.weight.new_zeros(channels, dtype=torch.float32))
    return a, b if p.bias is None else b + p.bias.to(torch.float32) * a


def _times(factors: Affine, scale: Scale) -> Affine:
    if isinstance(scale, float) and scale == 1.0:
        return factors
    s = torch.as_tensor(scale, dtype=torch.float32).detach().reshape(-1)
    return factors[0] * s, factors[1] * s
