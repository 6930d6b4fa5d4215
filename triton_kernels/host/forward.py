"""Training, forward: convolutions gather the statistics of the norms behind them, a pass adds the skip path."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from resnet_fused.ops.operators import Tensors, result_format
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.activations import IDENTITY
from resnet_fused.spec.facts import Facts

from ..device.epilogue import Epilogue, EpilogueConfig
from ..device.operands import RAW, Operand, Scale
from ..device.reductions import NONE, STATISTICS
from .block import BlockPlan, Source, given
from .policies import Policy


def forward(
    spec: BlockSpec, facts: Facts, tensors: Tensors, policy: Policy
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, convolution outputs to save, batch statistics); see operators.residual_block_forward."""
    block = BlockPlan(spec, facts, tensors, policy)
    block.write_tables([i for i, stage in enumerate(spec.convs) if stage.norm and not stage.batch_stats])
    if spec.order == "pre":
        if block.batch(0):
            _statistics_of_x(block)
        block.plan.barrier()
    order = list(range(len(spec.stages)))
    if spec.projection is not None:
        order.insert(1, block.projection)  # beside the first convolution: no barrier between them
    for conv in order:
        if conv not in (0, block.projection):
            block.plan.barrier()
        reduce = STATISTICS if block.batch(block.output_norm(conv)) else NONE
        block.y[conv] = block.convolve(conv, {}, EpilogueConfig(reduce=int(reduce), wide=block.wide))
    block.plan.barrier()
    out = _join(block)
    block.plan.run()
    result = out.contiguous(memory_format=result_format(given(tensors.x), block.weights, spec))
    conv_outputs = [given(block.y[i]) for i in facts.saved]
    return result, conv_outputs, [s for i, s in enumerate(block.statistics) if s is not None and block.batch(i)]


def _statistics_of_x(block: BlockPlan) -> None:
    channels, pixels = block.x.shape[1], block.x.numel() // block.x.shape[1]
    tile = block.pass_tile(channels)
    reduction = block.statistics_of(tile, -(-channels // tile.columns), 0, pixels)
    config = EpilogueConfig(reduce=int(STATISTICS), wide=block.wide)
    epilogue = Epilogue(None, channels, reduction=reduction)
    block.pass_over("statistics of x", Source(Operand(block.x, channels)), pixels, tile, epilogue, config)


def _join(block: BlockPlan) -> Tensor:
    """out = act(branch_scale * norm_n(y_n) + skip_scale * S), or with act where the order has it."""
    spec, last, s = block.spec, block.last, block.projection
    y = given(block.y[last])
    if spec.order == "pre" and spec.skip == "none" and block.branch_scale is None:
        return y  # which then is not saved
    stage = block.facts.convs[last].output_stage  # NONE in pre-activation order
    act, slope = block.act(stage), block.slope(stage)
    main, kind = block.normalized(y, stage)
    source, config = Source(main, kind), EpilogueConfig(act=act)
    if spec.order == "branch":  # the prologue's
        source, config = Source(main._replace(slope=slope), kind, act), EpilogueConfig()
    residual, residual_kind = Operand(), None
    if spec.skip == "identity":
        residual, residual_kind = Operand(block.x, block.x.shape[1]), int(RAW)
    elif spec.skip == "projection":
        residual, residual_kind = block.normalized(given(block.y[s]), block.output_norm(s))
    out = block.new(last)
    block.pass_over(
        "join",
        source,
        y.numel() // y.shape[1],
        block.pass_tile(y.shape[1]),
        Epilogue(
            out,
            y.shape[1],
            factor=block.scale(block.branch_scale),
            residual=residual,
            residual_scale=block.scale(block.skip_scale) if spec.skip != "none" else Scale(),
            slope=None if config.act == IDENTITY else slope,
        ),
        replace(config, residual=residual_kind),
    )
    return out
