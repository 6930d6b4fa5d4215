"""One block on its way to phases: its tensors by convolution, and the phases that all three directions share.

The formula and its symbols are those of resnet_fused/spec/block.py and ops/reference.py. What follows from a spec, such
as which norm stands before a convolution, comes from resnet_fused/spec/facts.py. Activations are NHWC here: the memory
of channels_last tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends.how import precision
from resnet_fused.ops.operators import Tensors
from resnet_fused.spec import Activation, BlockSpec, IntPair
from resnet_fused.spec.activations import IDENTITY
from resnet_fused.spec.facts import NONE, Facts

from ..device.convolution import Convolution, ConvolutionConfig
from ..device.epilogue import Epilogue, EpilogueConfig
from ..device.operands import NORM_ROWS, NORMALIZE, RAW, Operand, Scale
from ..device.pointwise import Pointwise, PointwiseConfig
from ..device.reductions import Norm, Reduction, Tables
from . import library, tuning
from .launch import INTERPRETED
from .plan import Plan, table_phase
from .policies import Policy

LAST = torch.channels_last


@dataclass
class Source:
    """An operand and how a prologue reads it. height, width: 0 where a pass reads it."""

    operand: Operand
    kind: int = int(RAW)
    act: Activation = IDENTITY
    height: int = 0
    width: int = 0

    @property
    def computed(self) -> bool:
        return self.kind != int(RAW) or self.act.name != "identity"


class BlockPlan:
    """The tensors of one block by convolution, and the phases that forward, backward and evaluation share.

    y, statistics, tables: by convolution and by stage; None until they are there.
    """

    def __init__(self, spec: BlockSpec, facts: Facts, tensors: Tensors, policy: Policy) -> None:
        self.spec, self.facts, self.policy = spec, facts, policy
        self.x = given(tensors.x).contiguous(memory_format=LAST)
        # weights come with their strides, vectors are read one after another
        self.branch_scale, self.skip_scale = _contiguous([tensors.branch_scale, tensors.skip_scale])
        self.weights = [given(weight) for weight in tensors.weights]
        self.biases = _contiguous(tensors.biases)
        self.norm_weights, self.norm_biases = _contiguous(tensors.norm_weights), _contiguous(tensors.norm_biases)
        self.running_means, self.running_vars = _contiguous(tensors.running_means), _contiguous(tensors.running_vars)
        self.slopes = _contiguous(tensors.slopes)
        self.last, self.projection = len(spec.stages) - 1, len(spec.stages)
        self.plan = Plan(self.x.device, policy.mode, policy.chip, policy.submit)
        self.wide = self.x.dtype == torch.float32 and policy.chip.doubles  # sums in float64
        self.precision = policy.precision or precision()
        self.y: list[Tensor | None] = [None] * len(spec.convs)
        self.statistics: list[Tensor | None] = [None] * len(spec.convs)
        self.tables: list[Tensor | None] = [None] * len(spec.convs)
        self.sizes: list[IntPair] = []
        for i, stage in enumerate(spec.convs):
            source = self.input_size(i)
            self.sizes.append(stage.output_size(source, self.kernel(i)))

    # --- the block's parts ----------------------------------------------------------------------------------------

    def kernel(self, conv: int) -> IntPair:
        shape = self.weights[conv].shape
        return shape[2], shape[3]

    def width(self, conv: int) -> int:
        return self.weights[conv].shape[0]

    def input_size(self, conv: int) -> IntPair:
        return (self.x.shape[2], self.x.shape[3]) if conv in (0, self.projection) else self.sizes[conv - 1]

    def input(self, conv: int) -> Tensor:
        """u: the tensor that the input norm of a convolution reads."""
        return self.x if conv in (0, self.projection) else given(self.y[conv - 1])

    def output_norm(self, conv: int) -> int:
        """The stage whose norm reads a convolution's output, NONE where there is none."""
        stage = self.facts.convs[conv].output_stage
        return stage if self.normed(stage) else NONE

    def normed(self, stage: int) -> bool:
        return stage != NONE and self.spec.convs[stage].norm

    def batch(self, stage: int) -> bool:
        return self.normed(stage) and self.spec.convs[stage].batch_stats

    def act(self, stage: int) -> Activation:
        return IDENTITY if stage == NONE else self.spec.convs[stage].activation

    def slope(self, stage: int) -> Scale | None:
        """The learned slope of a stage's activation, as kernels take it; None without one."""
        slope = None if stage == NONE else self.slopes[stage]
        return None if slope is None else self.scale(slope)

    def new(self, conv: int) -> Tensor:
        """An output of a convolution."""
        return self.activation(self.width(conv), self.sizes[conv])

    def activation(self, channels: int, size: IntPair) -> Tensor:
        return torch.empty(
            (self.x.shape[0], channels, *size), dtype=self.x.dtype, device=self.x.device, memory_format=LAST
        )

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def norm(self, stage: int) -> Norm:
        """The norm of a stage as kernels take it; an empty one where there is none."""
        if not self.normed(stage):
            return Norm()
        mean, var = self.running_means[stage], self.running_vars[stage]
        if self.spec.convs[stage].batch_stats:
            statistics = self.statistics[stage]
            mean, var = (statistics[0], statistics[1]) if statistics is not None else (None, None)
        return Norm(mean, var, self.norm_weights[stage], self.norm_biases[stage], self.spec.convs[stage].eps)

    def table(self, stage: int, channels: int) -> Tensor:
        table = self.tables[stage]
        if table is None:
            table = self.tables[stage] = self.floats(NORM_ROWS, channels)
        return table

    def norm_width(self, stage: int) -> int:
        """Channels of a stage's norm and activation."""
        if self.spec.order != "pre":
            return self.width(stage)
        return self.x.shape[1] if stage == 0 else self.width(stage - 1)

    def source(self, conv: int) -> Source:
        """P of a convolution, made in the prologue from what is stored."""
        u, stage = self.input(conv), self.facts.convs[conv].input_stage
        operand, kind = self.normalized(u, stage)
        return Source(operand._replace(slope=self.slope(stage)), kind, self.act(stage), *self.input_size(conv))

    def normalized(self, u: Tensor, stage: int) -> tuple[Operand, int]:
        """norm(u) as a prologue makes it, and how; u where the stage has no norm."""
        if not self.normed(stage):
            return Operand(u, u.shape[1]), int(RAW)
        return Operand(u, u.shape[1], self.table(stage, u.shape[1])), int(NORMALIZE)

    def scale(self, scale: Tensor | None) -> Scale:
        return Scale() if scale is None else Scale(scale, -int(scale.numel() > 1))

    def pass_tile(self, channels: int) -> tuning.Tile:
        return tuning.pointwise(self.policy.chip, self.x.dtype, channels)

    # --- phases ---------------------------------------------------------------------------------------------------

    def write_tables(self, norms: Sequence[int]) -> None:
        if norms:
            widths = tuple(self.norm_width(n) for n in norms)
            tables = tuple(self.table(n, width) for n, width in zip(norms, widths, strict=True))
            arguments = Tables(tuple(self.norm(n) for n in norms), tables, widths)
            self.plan.phase("tables", *table_phase(arguments))

    def reduction(self, tile: tuning.Tile, blocks: int, channels: int, rows: int, **parts: Any) -> Reduction:
        most = self.plan.workers(tile)
        dtype = torch.float64 if self.wide else torch.float32
        partials = torch.empty((most // min(blocks, most), 3, channels), dtype=dtype, device=self.x.device)
        return Reduction(partials, self.plan.tickets(blocks), float(rows), **parts)

    def statistics_of(self, tile: tuning.Tile, blocks: int, norm: int, rows: int) -> Reduction:
        """A reduction that writes the statistics and the table of `norm`, which reads the values."""
        channels = self.norm_width(norm)
        statistics = self.statistics[norm] = self.floats(2, channels)
        affine = Norm(None, None, self.norm_weights[norm], self.norm_biases[norm], self.spec.convs[norm].eps)
        return self.reduction(
            tile, blocks, channels, rows, norm=affine, stats=statistics, table=self.table(norm, channels)
        )

    def convolve(self, conv: int, epilogue: dict[str, Any], config: EpilogueConfig) -> Tensor:
        """y of a convolution, as one phase or as a library call with a pass before and after where needed."""
        stage, source, name = self.spec.convs[conv], self.source(conv), self.name(conv)
        norm, bias = self.output_norm(conv) if config.reduce else NONE, self.biases[conv]
        if conv in self.policy.library:
            p = self.materialize(f"{name}: input", source)
            y = self.plan.call(lambda: library.convolution(p, self.weights[conv], bias, stage))
            y = y.contiguous(memory_format=LAST)
            if not config.trivial:
                self.finish_pass(f"{name}: {'finish' if norm == NONE else 'statistics'}", y, norm, epilogue, config)
            return y
        y, groups, (h, w) = self.new(conv), stage.groups, self.sizes[conv]
        pixels = y.shape[0] * h * w
        tile = tuning.convolution(
            self.policy.chip, y.dtype, pixels, y.shape[1] // groups, source.operand.channels // groups, groups,
            int(source.computed) + (norm != NONE and self.policy.chip.arch not in (80, 90)),
        )  # fmt: skip
        blocks = groups * -(-(y.shape[1] // groups) // tile.columns)
        reduction = Reduction() if norm == NONE else self.statistics_of(tile, blocks, norm, pixels)
        self.plan.phase(
            name,
            self.config(conv, tile, source, False, config),
            Convolution(
                source.operand, source.height, source.width, self.weights[conv], strides(self.weights[conv]),
                y.shape[0], h, w, groups, source.operand.channels // groups, y.shape[1] // groups,
                Epilogue(y, y.shape[1], bias, reduction=reduction, **epilogue),
            ),
            tile,
            blocks * -(-pixels // tile.rows),
        )  # fmt: skip
        return y

    def finish_pass(self, name: str, y: Tensor, norm: int, epilogue: dict[str, Any], config: EpilogueConfig) -> None:
        """The epilogue of a convolution that the library ran."""
        pixels = y.numel() // y.shape[1]
        tile = self.pass_tile(y.shape[1])
        blocks = -(-y.shape[1] // tile.columns)
        reduction = Reduction() if norm == NONE else self.statistics_of(tile, blocks, norm, pixels)
        arguments = Epilogue(y if config.writes else None, y.shape[1], reduction=reduction, **epilogue)
        self.plan.barrier()
        self.pass_over(name, Source(Operand(y, y.shape[1])), pixels, tile, arguments, config)
        self.plan.barrier()

    def pass_over(
        self,
        name: str,
        source: Source,
        pixels: int,
        tile: tuning.Tile,
        epilogue: Epilogue,
        config: EpilogueConfig,
    ) -> None:
        self.plan.phase(
            name,
            PointwiseConfig(source.kind, source.act, config, tile.rows, tile.columns),
            Pointwise(source.operand, pixels, epilogue),
            tile,
            -(-source.operand.channels // tile.columns) * -(-pixels // tile.rows),
        )

    def materialize(self, name: str, source: Source) -> Tensor:
        """The operand as a tensor of its own: for the library, or where recomputing it costs more."""
        x = source.operand.x
        if not source.computed:
            return x
        out = torch.empty_like(x, memory_format=LAST)
        tile = self.pass_tile(source.operand.channels)
        self.pass_over(
            name, source, x.numel() // x.shape[1], tile, Epilogue(out, source.operand.channels), EpilogueConfig()
        )
        self.plan.barrier()
        return out

    def config(
        self, conv: int, tile: tuning.Tile, source: Source, transposed: bool, epilogue: EpilogueConfig
    ) -> ConvolutionConfig:
        stage = self.spec.convs[conv]
        return ConvolutionConfig(
            self.kernel(conv), *stage.geometry, transposed, source.kind, source.act, epilogue,
            tile.rows, tile.columns, tile.depth, tile.buffers,
            self.precision, upcasts(self.x.dtype),
        )  # fmt: skip

    def name(self, conv: int) -> str:
        return "projection" if conv == self.projection else f"conv{conv + 1}"


def given(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def strides(t: Tensor) -> tuple[int, int, int, int]:
    k, c, r, s = t.stride()
    return k, c, r, s


def upcasts(dtype: torch.dtype) -> bool:
    return bool(INTERPRETED) and dtype == torch.bfloat16


def _contiguous(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]
