"""Evaluation: norms are folded into weights and biases; the convolutions' epilogues do the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from resnet_fused.ops.operators import result_format
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import NONE, Facts
from resnet_fused.spec.tensors import BlockTensors

from ..device.chained import WIDEST, Chained, ChainedConfig
from ..device.convolution import Convolution
from ..device.epilogue import Epilogue, EpilogueConfig
from ..device.operands import RAW, Operand
from . import tuning
from .block import BlockPlan, given, strides
from .policies import Policy


def infer(
    spec: BlockSpec,
    facts: Facts,
    x: Tensor,
    pre: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    branch_scale: Tensor | None,
    skip_scale: Tensor | None,
    slopes: Sequence[Tensor | None],
    policy: Policy,
) -> Tensor:
    """The block with its norms folded into weights and biases. pre: the table of a leading norm."""
    nothing: list[Tensor | None] = [None] * len(weights)
    tensors: BlockTensors[Tensor | None] = BlockTensors(
        x, branch_scale, skip_scale, list(weights), list(biases), nothing, nothing, nothing, nothing, list(slopes)
    )
    block = BlockPlan(folded_spec(spec, pre is not None), _folded_facts(facts, spec.order == "pre"), tensors, policy)
    if pre is not None:
        block.tables[0] = pre
    last, s = block.last, block.projection
    if spec.projection is not None:
        block.y[s] = block.convolve(s, {}, EpilogueConfig())
    chains = _chains(block)
    for conv in range(last + 1):
        if conv > 0 or (conv == last and spec.projection is not None):
            block.plan.barrier()
        if chains and conv == last - 1:
            continue
        epilogue, config = _epilogue(block, conv)
        if chains and conv == last:
            block.y[conv] = _chain(block, conv, epilogue, config)
        else:
            block.y[conv] = block.convolve(conv, epilogue, config)
    block.plan.run()
    return given(block.y[last]).contiguous(memory_format=result_format(x, weights, spec))


def _epilogue(block: BlockPlan, conv: int) -> tuple[dict[str, Any], EpilogueConfig]:
    """What follows a convolution: its activation and, behind the last, the scales and the skip path."""
    spec, stage = block.spec, block.facts.convs[conv].output_stage
    parts: dict[str, Any] = {"slope": block.slope(stage)}
    config = EpilogueConfig(act=block.act(stage))
    if conv == block.last:
        config = replace(config, branch=spec.order == "branch")
        if block.branch_scale is not None:
            parts["factor"] = block.scale(block.branch_scale)
        if spec.skip != "none":
            skip = block.x if spec.skip == "identity" else given(block.y[block.projection])
            parts["residual"], config = Operand(skip, skip.shape[1]), replace(config, residual=int(RAW))
        if spec.skip == "identity":
            parts["residual_scale"] = block.scale(block.skip_scale)
    return parts, config


def _chain(block: BlockPlan, conv: int, epilogue: dict[str, Any], config: EpilogueConfig) -> Tensor:
    """y of the last convolution, computed together with the one before it, whose y is never stored."""
    first, (h, w) = conv - 1, block.sizes[conv]
    stage = block.facts.convs[first].output_stage  # its activation stands between the two
    source, y, middle = block.source(first), block.new(conv), block.width(first)
    pixels, channels = y.shape[0] * h * w, source.operand.channels
    tile = tuning.chained(block.policy.chip, y.dtype, pixels, middle, channels)
    weight = block.weights[conv]
    block.plan.phase(
        f"{block.name(first)} and {block.name(conv)}",
        ChainedConfig(
            block.config(first, tile, source, False, EpilogueConfig()),
            block.act(stage),
            min(tile.columns, 64),
            config,
        ),
        Chained(
            Convolution(
                source.operand, source.height, source.width, block.weights[first], strides(block.weights[first]),
                y.shape[0], h, w, 1, channels, middle, Epilogue(bias=block.biases[first]),
            ),
            weight, weight.stride(0), weight.stride(1), y.shape[1],
            Epilogue(y, y.shape[1], block.biases[conv], **epilogue), block.slope(stage),
        ),
        tile,
        -(-pixels // tile.rows),
    )  # fmt: skip
    return y


def _chains(block: BlockPlan) -> bool:
    """Whether the last two convolutions run at once: the last has one tap, and what it reads fits a worker."""
    if block.last == 0:
        return False
    first, second = block.spec.stages[-2:]
    plain = (
        second.geometry == ((1, 1), (0, 0), (1, 1))
        and block.kernel(block.last) == (1, 1)
        and first.groups == second.groups == 1
    )
    library = {block.last - 1, block.last} & block.policy.library
    return plain and not library and block.width(block.last - 1) <= WIDEST


@lru_cache(maxsize=1024)
def folded_spec(spec: BlockSpec, pre: bool) -> BlockSpec:
    """The spec whose norms are gone, but for a leading one with `pre`."""
    stages = [
        replace(stage, norm=pre and i == 0 and spec.order == "pre", batch_stats=False)
        for i, stage in enumerate(spec.stages)
    ]
    projection = None if spec.projection is None else replace(spec.projection, norm=False)
    return replace(spec, stages=tuple(stages), projection=projection)


@lru_cache(maxsize=1024)
def _folded_facts(facts: Facts, pre: bool) -> Facts:
    """Without input stages, since epilogues apply the activations; with `pre` the leading stage stays."""
    convs = [conv if pre and conv.input_stage == 0 else replace(conv, input_stage=NONE) for conv in facts.convs]
    return replace(facts, convs=tuple(convs))
