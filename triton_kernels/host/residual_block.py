"""Which phases a residual block is made of: training forward, backward, and evaluation.

The formula, its symbols and the order of the gradients are those of resnet_fused/ops/reference.py, autograd.py and
operators.py; `tensors` is `autograd.flatten`. Activations are NHWC here: channels_last tensors, by their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.backends.how import Mode, precision
from resnet_fused.ops.operators import TensorList, output_format, saved_convs
from resnet_fused.spec import BlockSpec, IntPair, StageSpec

from ..device.chained import WIDEST, Chained, ChainedConfig
from ..device.convolution import Convolution, ConvolutionConfig
from ..device.epilogue import BY_NORM, BY_OUT, UNMASKED, Epilogue, EpilogueConfig
from ..device.operands import GRADIENT, GRADIENT_ROWS, NORM_ROWS, NORMALIZE, RAW, Operand, Scale
from ..device.pointwise import Pointwise, PointwiseConfig
from ..device.reductions import NONE, STATISTICS, SUMS, Norm, Reduction, Tables, VectorGradients
from ..device.weight_gradient import WeightGradient, WeightGradientConfig
from . import library, tuning
from .chips import Chip
from .launch import INTERPRETED, Program, Submit, table_phase

LAST = torch.channels_last


@dataclass(frozen=True)
class Policy:
    """How a block runs. library: the convolutions (indices into spec.convs) left to the vendor's library.

    submit: receives the launches instead of the device, e.g. to compile them for another.
    precision: of float32 products, "ieee" or "tf32"; None: PyTorch's of now (`how.precision`).
    """

    chip: Chip
    mode: Mode = "single"
    library: frozenset[int] = frozenset()
    submit: Submit | None = None
    precision: str | None = None


@dataclass
class Source:
    """An operand with how to read it: what a prologue is given."""

    operand: Operand
    kind: int
    relu: bool
    height: int
    width: int

    @property
    def computed(self) -> bool:
        return self.kind != int(RAW) or self.relu


class Block:
    """The tensors of one block by convolution, and the phases that forward, backward and evaluation share."""

    def __init__(self, spec: BlockSpec, tensors: TensorList, policy: Policy) -> None:
        x, *vectors = tensors
        assert x is not None
        self.spec, self.policy = spec, policy
        self.x = x.contiguous(memory_format=LAST)
        # weights come with their strides, vectors are read one after another
        vectors = [t.contiguous() if t is not None and t.dim() != 4 else t for t in vectors]
        self.branch_scale, self.skip_scale, *flat = vectors
        self.stages = [flat[i : i + 6] for i in range(0, len(flat), 6)]
        self.last, self.projection = len(spec.stages) - 1, len(spec.stages)
        self.pre = spec.order == "pre"
        self.program = Program(x.device, policy.mode, policy.chip, policy.submit)
        self.wide = x.dtype == torch.float32 and policy.chip.doubles  # sums in float64
        self.precision = policy.precision or precision()
        self.y: list[Tensor | None] = [None] * len(spec.convs)
        self.statistics: list[Tensor | None] = [None] * len(spec.convs)
        self.tables: list[Tensor | None] = [None] * len(spec.convs)
        self.sizes: list[IntPair] = []
        for i, stage in enumerate(spec.convs):
            source = self.input_size(i)
            self.sizes.append(stage.output_size(source, self.kernel(i)))

    # --- the block's parts ----------------------------------------------------------------------------------------

    def weight(self, conv: int) -> Tensor:
        weight = self.stages[conv][0]
        assert weight is not None
        return weight

    def kernel(self, conv: int) -> IntPair:
        shape = self.weight(conv).shape
        return shape[2], shape[3]

    def strides(self, conv: int) -> tuple[int, int, int, int]:
        return _strides(self.weight(conv))

    def width(self, conv: int) -> int:
        return self.weight(conv).shape[0]

    def input_size(self, conv: int) -> IntPair:
        return (self.x.shape[2], self.x.shape[3]) if conv in (0, self.projection) else self.sizes[conv - 1]

    def input(self, conv: int) -> Tensor:
        """u: what the input norm of a convolution reads."""
        u = self.x if conv in (0, self.projection) else self.y[conv - 1]
        assert u is not None
        return u

    def input_norm(self, conv: int) -> int | None:
        """The stage whose norm and activation stand before a convolution; None where nothing does."""
        if conv == self.projection:
            return 0 if self.pre else None
        norm = conv if self.pre else conv - 1
        return norm if norm >= 0 else None

    def output_norm(self, conv: int) -> int | None:
        """The stage whose norm reads a convolution's output, None where there is none."""
        if not self.pre:
            norm = conv
        elif conv < self.last:
            norm = conv + 1
        else:
            return None
        return norm if self.spec.convs[norm].norm else None

    def batch(self, norm: int | None) -> bool:
        return norm is not None and self.spec.convs[norm].norm and self.spec.convs[norm].batch_stats

    def new(self, conv: int) -> Tensor:
        """An output of a convolution."""
        return self.activation(self.width(conv), self.sizes[conv])

    def activation(self, channels: int, size: IntPair) -> Tensor:
        return torch.empty(
            (self.x.shape[0], channels, *size), dtype=self.x.dtype, device=self.x.device, memory_format=LAST
        )

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def norm(self, stage: int | None) -> Norm:
        """The norm of a stage as kernels take it; an empty one where there is none."""
        if stage is None or not self.spec.convs[stage].norm:
            return Norm()
        _, _, gamma, beta, mean, var = self.stages[stage]
        if self.spec.convs[stage].batch_stats:
            statistics = self.statistics[stage]
            mean, var = (statistics[0], statistics[1]) if statistics is not None else (None, None)
        return Norm(mean, var, gamma, beta, self.spec.convs[stage].eps)

    def table(self, stage: int, channels: int) -> Tensor:
        table = self.tables[stage]
        if table is None:
            table = self.tables[stage] = self.floats(NORM_ROWS, channels)
        return table

    def norm_width(self, stage: int) -> int:
        """Channels of a stage's norm."""
        if not self.pre:
            return self.width(stage)
        return self.x.shape[1] if stage == 0 else self.width(stage - 1)

    def source(self, conv: int) -> Source:
        """P of a convolution, made in the prologue from what is stored."""
        u, norm, size = self.input(conv), self.input_norm(conv), self.input_size(conv)
        if norm is None:
            return Source(Operand(u, u.shape[1]), int(RAW), False, *size)
        stage = self.spec.convs[norm]
        if not stage.norm:
            return Source(Operand(u, u.shape[1]), int(RAW), stage.act == "relu", *size)
        table = self.table(norm, u.shape[1])
        return Source(Operand(u, u.shape[1], table), int(NORMALIZE), stage.act == "relu", *size)

    def scale(self, scale: Tensor | None) -> Scale:
        return Scale() if scale is None else Scale(scale, int(scale.numel() > 1))

    def pass_tile(self, channels: int) -> tuning.Tile:
        return tuning.pointwise(self.policy.chip, self.x.dtype, channels)

    # --- phases ---------------------------------------------------------------------------------------------------

    def write_tables(self, norms: Sequence[int]) -> None:
        if norms:
            widths = tuple(self.norm_width(n) for n in norms)
            tables = tuple(self.table(n, width) for n, width in zip(norms, widths, strict=True))
            arguments = Tables(tuple(self.norm(n) for n in norms), tables, widths)
            self.program.phase("tables", *table_phase(arguments))

    def reduction(self, tile: tuning.Tile, blocks: int, channels: int, rows: int, **parts: Any) -> Reduction:
        most = self.program.workers(tile)
        dtype = torch.float64 if self.wide else torch.float32
        partials = torch.empty((most // min(blocks, most), 3, channels), dtype=dtype, device=self.x.device)
        return Reduction(partials, self.program.tickets(blocks), float(rows), **parts)

    def statistics_of(self, tile: tuning.Tile, blocks: int, norm: int, rows: int) -> Reduction:
        """Statistics of the norm that reads the values; its table, too."""
        channels = self.norm_width(norm)
        statistics = self.statistics[norm] = self.floats(2, channels)
        _, _, gamma, beta, _, _ = self.stages[norm]
        affine = Norm(None, None, gamma, beta, self.spec.convs[norm].eps)
        return self.reduction(
            tile, blocks, channels, rows, norm=affine, stats=statistics, table=self.table(norm, channels)
        )

    def convolve(self, conv: int, bias: Tensor | None, epilogue: dict[str, Any], config: EpilogueConfig) -> Tensor:
        """y of a convolution, as one phase or as a library call with a pass before and after where needed."""
        stage, source, name = self.spec.convs[conv], self.source(conv), self.name(conv)
        norm = self.output_norm(conv) if config.reduce else None
        if conv in self.policy.library:
            p = self.materialize(f"{name}: input", source)
            y = self.program.call(lambda: library.convolution(p, self.weight(conv), bias, stage))
            y = y.contiguous(memory_format=LAST)
            if not config.trivial:
                self.finish_pass(f"{name}: {'statistics' if norm is not None else 'finish'}", y, norm, epilogue, config)
            return y
        y, groups, (h, w) = self.new(conv), stage.groups, self.sizes[conv]
        pixels = y.shape[0] * h * w
        tile = tuning.convolution(
            self.policy.chip, y.dtype, pixels, y.shape[1] // groups, source.operand.channels // groups, groups,
            int(source.computed) + (norm is not None and self.policy.chip.arch not in (80, 90)),
        )  # fmt: skip
        blocks = groups * -(-(y.shape[1] // groups) // tile.columns)
        reduction = Reduction() if norm is None else self.statistics_of(tile, blocks, norm, pixels)
        self.program.phase(
            name,
            self.config(conv, tile, source, False, config),
            Convolution(
                source.operand, source.height, source.width, self.weight(conv), self.strides(conv),
                y.shape[0], h, w, groups, source.operand.channels // groups, y.shape[1] // groups,
                Epilogue(y, y.shape[1], bias, reduction=reduction, **epilogue),
            ),
            tile,
            blocks * -(-pixels // tile.rows),
        )  # fmt: skip
        return y

    def chain(self, conv: int, relu: bool, epilogue: dict[str, Any], config: EpilogueConfig) -> Tensor:
        """y of the last convolution, made together with the one before it, whose y is never stored."""
        first, (h, w) = conv - 1, self.sizes[conv]
        source, y, middle = self.source(first), self.new(conv), self.width(first)
        pixels, channels = y.shape[0] * h * w, source.operand.channels
        tile = tuning.chained(self.policy.chip, y.dtype, pixels, middle, channels)
        weight = self.weight(conv)
        self.program.phase(
            f"{self.name(first)} and {self.name(conv)}",
            ChainedConfig(
                self.config(first, tile, source, False, EpilogueConfig()), relu, min(tile.columns, 64), config
            ),
            Chained(
                Convolution(
                    source.operand, source.height, source.width, self.weight(first), self.strides(first),
                    y.shape[0], h, w, 1, channels, middle, Epilogue(bias=self.stages[first][1]),
                ),
                weight, weight.stride(0), weight.stride(1), y.shape[1],
                Epilogue(y, y.shape[1], self.stages[conv][1], **epilogue),
            ),
            tile,
            -(-pixels // tile.rows),
        )  # fmt: skip
        return y

    def finish_pass(
        self, name: str, y: Tensor, norm: int | None, epilogue: dict[str, Any], config: EpilogueConfig
    ) -> None:
        """The epilogue of a convolution that the library ran."""
        pixels = y.numel() // y.shape[1]
        tile = self.pass_tile(y.shape[1])
        blocks = -(-y.shape[1] // tile.columns)
        reduction = Reduction() if norm is None else self.statistics_of(tile, blocks, norm, pixels)
        writes = config.relu or config.residual is not None
        arguments = Epilogue(y if writes else None, y.shape[1], reduction=reduction, **epilogue)
        self.program.barrier()
        self.pass_over(name, Source(Operand(y, y.shape[1]), int(RAW), False, 0, 0), pixels, tile, arguments, config)
        self.program.barrier()

    def pass_over(
        self,
        name: str,
        source: Source,
        pixels: int,
        tile: tuning.Tile,
        epilogue: Epilogue,
        config: EpilogueConfig,
    ) -> None:
        self.program.phase(
            name,
            PointwiseConfig(source.kind, source.relu, config, tile.rows, tile.columns),
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
        self.program.barrier()
        return out

    def config(
        self, conv: int, tile: tuning.Tile, source: Source, transposed: bool, epilogue: EpilogueConfig
    ) -> ConvolutionConfig:
        stage = self.spec.convs[conv]
        return ConvolutionConfig(
            self.kernel(conv), *stage.geometry, transposed, source.kind, source.relu, epilogue,
            tile.rows, tile.columns, tile.depth, tile.stages,
            self.precision, upcasts(self.x.dtype),
        )  # fmt: skip

    def name(self, conv: int) -> str:
        return "projection" if conv == self.projection else f"conv{conv + 1}"


def _strides(t: Tensor) -> tuple[int, int, int, int]:
    k, c, r, s = t.stride()
    return k, c, r, s


def upcasts(dtype: torch.dtype) -> bool:
    return bool(INTERPRETED) and dtype == torch.bfloat16


# --- training, forward -----------------------------------------------------------------------------------------------


def forward(
    spec: BlockSpec, tensors: TensorList, needs: Sequence[bool], policy: Policy
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, convolution outputs to save, batch statistics); see operators.residual_block_forward."""
    block = Block(spec, tensors, policy)
    block.write_tables([i for i, stage in enumerate(spec.convs) if stage.norm and not stage.batch_stats])
    if block.pre:
        if block.batch(0):
            pixels = block.x.numel() // block.x.shape[1]
            tile = block.pass_tile(block.x.shape[1])
            reduction = block.statistics_of(tile, -(-block.x.shape[1] // tile.columns), 0, pixels)
            source = Source(Operand(block.x, block.x.shape[1]), int(RAW), False, 0, 0)
            config = EpilogueConfig(reduce=int(STATISTICS), wide=block.wide)
            epilogue = Epilogue(None, block.x.shape[1], reduction=reduction)
            block.pass_over("statistics of x", source, pixels, tile, epilogue, config)
        block.program.barrier()
    order = list(range(len(spec.stages)))
    if spec.projection is not None:
        order.insert(1, block.projection)  # beside the first convolution: no barrier between them
    for conv in order:
        if conv not in (0, block.projection):
            block.program.barrier()
        reduce = STATISTICS if block.batch(block.output_norm(conv)) else NONE
        block.y[conv] = block.convolve(
            conv, block.stages[conv][1], {}, EpilogueConfig(reduce=int(reduce), wide=block.wide)
        )
    block.program.barrier()
    out = _join(block)
    block.program.run()
    result = out.contiguous(memory_format=output_format(_given(tensors[0]), [_given(t) for t in tensors[3::6]], spec))
    conv_outputs = [_given(block.y[i]) for i in saved_convs(spec, needs)]
    return result, conv_outputs, [s for i, s in enumerate(block.statistics) if s is not None and block.batch(i)]


def _join(block: Block) -> Tensor:
    """out = act(branch_scale * norm_n(y_n) + skip_scale * S)"""
    spec, last, s = block.spec, block.last, block.projection
    y = _given(block.y[last])
    relu = not block.pre and spec.stages[-1].act == "relu"
    if block.pre and spec.skip == "none" and block.branch_scale is None:
        return y  # which then is not saved

    def normed(conv: int, u: Tensor) -> tuple[Operand, int]:
        norm = None if block.pre else block.output_norm(conv)
        if norm is None:
            return Operand(u, u.shape[1]), int(RAW)
        return Operand(u, u.shape[1], block.table(norm, u.shape[1])), int(NORMALIZE)

    main, kind = normed(last, y)
    residual, residual_kind = Operand(), None
    if spec.skip == "identity":
        residual, residual_kind = Operand(block.x, block.x.shape[1]), int(RAW)
    elif spec.skip == "projection":
        residual, residual_kind = normed(s, _given(block.y[s]))
    out = block.new(last)
    tile = block.pass_tile(y.shape[1])
    block.pass_over(
        "join",
        Source(main, kind, False, 0, 0),
        y.numel() // y.shape[1],
        tile,
        Epilogue(
            out,
            y.shape[1],
            factor=block.scale(block.branch_scale),
            residual=residual,
            residual_scale=block.scale(block.skip_scale) if spec.skip != "none" else Scale(),
        ),
        EpilogueConfig(residual_kind, relu),
    )
    return out


def _given(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


# --- training, backward ----------------------------------------------------------------------------------------------


def backward(
    spec: BlockSpec,
    dout: Tensor,
    out: Tensor | None,
    conv_outputs: Sequence[Tensor],
    batch_stats: Sequence[Tensor],
    tensors: TensorList,
    needs: Sequence[bool],
    policy: Policy,
) -> list[Tensor | None]:
    """The gradient of every entry of `tensors`, None where `needs` is false."""
    return Backward(spec, tensors, list(needs), policy).run(dout, out, conv_outputs, batch_stats)


class Backward(Block):
    def __init__(self, spec: BlockSpec, tensors: TensorList, needs: list[bool], policy: Policy) -> None:
        super().__init__(spec, tensors, policy)
        self.tensors, self.needs = tensors, needs
        self.grads: list[Tensor | None] = [None] * len(tensors)
        self.after: list[Any] = []  # what follows the launches: gradients of scales from their per-channel values

    # --- which gradients --------------------------------------------------------------------------------------------

    def wants(self, conv: int, part: int) -> bool:
        """part: 0 weight, 1 bias, 2 norm weight, 3 norm bias."""
        return self.needs[3 + 6 * conv + part]

    def wants_below(self, conv: int) -> bool:
        """Whether anything before a convolution, its input norm included, wants a gradient."""
        if self.needs[0] or any(self.wants(k, part) for k in range(conv) for part in range(4)):
            return True
        norm = self.input_norm(conv)
        return norm is not None and (self.wants(norm, 2) or self.wants(norm, 3))

    def wants_output(self, conv: int) -> bool:
        """Whether dy of a convolution is wanted."""
        if self.wants(conv, 0) or self.wants(conv, 1):
            return True
        if conv == self.projection:
            return self.needs[0] or (self.pre and (self.wants(0, 2) or self.wants(0, 3)))
        return self.wants_below(conv)

    def gradient(self, conv: int, part: int) -> Tensor | None:
        """A buffer [C] for the gradient of a vector, None if it is not wanted."""
        if not self.wants(conv, part):
            return None
        index = 3 + 6 * conv + part
        parameter = _given(self.tensors[index])
        grad = self.grads[index] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        return grad

    def vector_gradients(
        self, conv: int | None, norm: int | None, scale: Tensor | None, scale_index: int | None, channels: int
    ) -> VectorGradients:
        """What follows from the sums of dz and dz * y for y of `conv` (None: x) and the norm that reads it."""
        normed = norm is not None and self.spec.convs[norm].norm
        dfactor = None
        if scale is not None and scale_index is not None and self.needs[scale_index]:
            dfactor = torch.empty(channels, dtype=torch.float64, device=self.x.device)
            self.after.append((scale_index, dfactor, scale))
        wants_table = conv is None or self.wants_output(conv)
        return VectorGradients(
            self.norm(norm) if normed else Norm(),
            self.scale(scale),
            self.floats(GRADIENT_ROWS, channels) if wants_table and (normed or scale is not None) else None,
            self.gradient(norm, 2) if normed and norm is not None else None,
            self.gradient(norm, 3) if normed and norm is not None else None,
            dfactor,
            None if conv is None else self.gradient(conv, 1),
        )

    # --- the steps --------------------------------------------------------------------------------------------------

    def run(
        self, dout: Tensor, out: Tensor | None, conv_outputs: Sequence[Tensor], batch_stats: Sequence[Tensor]
    ) -> list[Tensor | None]:
        spec, s = self.spec, self.projection
        self.restore(conv_outputs, batch_stats)
        dz, dy, dy_s = self.join(dout.contiguous(memory_format=LAST), out)
        through_skip = dz if spec.skip == "identity" else None  # what nothing will read again is not held
        del dz
        dp_s: Tensor | None = None
        if dy_s is not None:
            self.program.barrier()
            dy_s = self.settle("projection: dy", s, dy_s)
            self.weight_grad(s, dy_s)
            norm = self.input_norm(s)
            if self.needs[0] or (norm is not None and (self.wants(norm, 2) or self.wants(norm, 3))):
                dp_s = self.data_grad(s, dy_s, Epilogue(channels=self.x.shape[1]), EpilogueConfig())
            dy_s = self.y[s] = None
        dx: Tensor | None = None
        for conv in reversed(range(len(spec.stages))):
            if not self.wants_output(conv):
                break
            self.program.barrier()
            dy = self.settle(f"{self.name(conv)}: dy", conv, dy)
            self.weight_grad(conv, dy)
            if not self.wants_below(conv):
                break
            dx, dy = self.step(conv, dy, through_skip, dp_s)
            if conv == self.last:
                self.y[conv] = None  # which may have been recomputed
        self.program.run()
        if self.needs[0]:
            self.grads[0] = _given(dx).contiguous(memory_format=suggest_memory_format(_given(self.tensors[0])))
        for index, per_channel, scale in self.after:
            total = per_channel.sum() if scale.numel() == 1 else per_channel
            self.grads[index] = total.to(scale.dtype).reshape(scale.shape)
        return [grad if need else None for grad, need in zip(self.grads, self.needs, strict=True)]

    def restore(self, conv_outputs: Sequence[Tensor], batch_stats: Sequence[Tensor]) -> None:
        """The saved tensors in their places, norm tables, and the outputs that memory="low" did not keep."""
        spec = self.spec
        for i, y in zip(saved_convs(spec, self.needs), conv_outputs, strict=True):
            self.y[i] = y.contiguous(memory_format=LAST)
        statistics = iter(batch_stats)
        for i in range(len(spec.convs)):
            if self.batch(i):
                self.statistics[i] = next(statistics)
        read = {self.input_norm(i) for i in range(len(spec.convs))}
        if self.masks_by_norm() and not self.pre:
            read.add(self.last)
        self.write_tables(sorted(n for n in read if n is not None and spec.convs[n].norm))
        missing = [i for i in saved_convs(spec.with_memory("default"), self.needs) if self.y[i] is None]
        if missing:
            self.program.barrier()
            for i in missing:
                self.y[i] = self.convolve(i, self.stages[i][1], {}, EpilogueConfig())
        if missing or self.masks_by_norm():
            self.program.barrier()

    def masks_by_norm(self) -> bool:
        return not self.pre and self.spec.skip == "none" and self.spec.stages[-1].act == "relu"

    def join(self, dout: Tensor, out: Tensor | None) -> tuple[Tensor, Source, Source | None]:
        """dz, and dy of the last convolution and of the projection, as prologues make them from dz."""
        spec, last, s = self.spec, self.last, self.projection
        channels, pixels = dout.shape[1], dout.numel() // dout.shape[1]
        relu = not self.pre and spec.stages[-1].act == "relu"
        mask = UNMASKED if not relu else BY_NORM if self.masks_by_norm() else BY_OUT
        norm = None if self.pre else self.output_norm(last)
        first = self.vector_gradients(last, norm, self.branch_scale, 1, channels)
        second, skip = VectorGradients(), None
        norm_s = None
        if spec.skip == "projection":
            norm_s = None if self.pre else self.output_norm(s)
            second, skip = self.vector_gradients(s, norm_s, self.skip_scale, 2, channels), self.y[s]
        elif spec.skip == "identity" and self.skip_scale is not None and self.needs[2]:
            second, skip = self.vector_gradients(None, None, self.skip_scale, 2, channels), self.x
        elif self.needs[2]:  # a skip scale without a skip path
            self.after.append((2, torch.zeros(channels, device=dout.device), self.skip_scale))

        dz = torch.empty_like(dout, memory_format=LAST) if mask != UNMASKED else dout
        sums_y = self.y[last] is not None and (norm is not None or first.dfactor is not None)
        sums_s = skip is not None and (norm_s is not None or second.dfactor is not None)
        wanted = [g for v in (first, second) for g in v[2:]]
        reduces = any(g is not None for g in wanted)
        if reduces or mask != UNMASKED:
            tile = self.pass_tile(channels)
            blocks = -(-channels // tile.columns)
            reduction = Reduction()
            if reduces:
                reduction = self.reduction(tile, blocks, channels, pixels, first=first, second=second)
            config = EpilogueConfig(
                mask=int(mask),
                mask_normalizes=norm is not None,
                reduce=int(SUMS) if reduces else int(NONE),
                sums_y=sums_y,
                sums_s=sums_s,
                batch=self.batch(norm),
                batch_s=self.batch(norm_s),
                wide=self.wide,
            )
            y = self.y[last]
            by_norm = mask == BY_NORM
            epilogue = Epilogue(
                dz if mask != UNMASKED else None,
                channels,
                factor=self.scale(self.branch_scale) if by_norm else Scale(),
                mask=out.contiguous(memory_format=LAST) if mask == BY_OUT and out is not None else None,
                y=Operand(y, channels, self.tables[norm] if by_norm and norm is not None else None),
                center=first.norm.mean,
                s=skip if sums_s else None,
                center_s=second.norm.mean,
                reduction=reduction,
            )
            source = Source(Operand(dout, channels), int(RAW), False, 0, 0)
            self.pass_over("join", source, pixels, tile, epilogue, config)
        dy = self.dy(last, dz, first, self.batch(norm))
        dy_s = None
        if spec.skip == "projection" and self.wants_output(s):
            dy_s = self.dy(s, dz, second, self.batch(norm_s))
        return dz, dy, dy_s

    def dy(self, conv: int, dz: Tensor, gradients: VectorGradients, batch: bool) -> Source:
        """dy of a convolution from dz behind its norm."""
        if gradients.table is None:
            return Source(Operand(dz, dz.shape[1]), int(RAW), False, *self.sizes[conv])
        y = self.y[conv] if batch else None
        return Source(Operand(dz, dz.shape[1], gradients.table, y), int(GRADIENT), False, *self.sizes[conv])

    def settle(self, name: str, conv: int, dy: Source) -> Source:
        """dy as the convolution's two gradients read it: made in their prologues for a single tap, else written out.

        With R x S taps each element would be made R x S times in both, and two tensors read for it instead of one.
        """
        taps = self.weight(conv).shape[2] * self.weight(conv).shape[3]
        if dy.kind == int(RAW) or (taps == 1 and conv not in self.policy.library):
            return dy
        tensor = self.materialize(name, dy)
        return Source(Operand(tensor, tensor.shape[1]), int(RAW), False, dy.height, dy.width)

    def step(
        self, conv: int, dy: Source, through_skip: Tensor | None, dp_s: Tensor | None
    ) -> tuple[Tensor | None, Source]:
        """From dy of a convolution to dy of the one before it, or to dx.

        through_skip: dz of the join, where the skip path is the identity. dp_s: what the projection gives back to x.
        """
        norm, u = self.input_norm(conv), self.input(conv)
        channels, pixels = u.shape[1], u.numel() // u.shape[1]
        residual, residual_scale = None, Scale()
        if conv == 0 and dp_s is not None:
            residual = dp_s
        elif conv == 0 and norm is None and through_skip is not None:
            residual, residual_scale = through_skip, self.scale(self.skip_scale)
        normed = norm is not None and self.spec.convs[norm].norm
        relu = norm is not None and self.spec.convs[norm].act == "relu"
        below = conv - 1 if conv > 0 else None
        gradients = VectorGradients()
        if normed or (below is not None and self.wants(below, 1)):
            gradients = self.vector_gradients(below, norm, None, None, channels)
        reduces = any(g is not None for g in gradients[2:])
        config = EpilogueConfig(
            residual=int(RAW) if residual is not None else None,
            mask=int(BY_NORM) if relu else int(UNMASKED),
            mask_normalizes=normed,
            reduce=int(SUMS) if reduces else int(NONE),
            sums_y=normed,
            batch=self.batch(norm),
            wide=self.wide,
        )
        epilogue = Epilogue(
            channels=channels,
            residual=Operand(residual, channels),
            residual_scale=residual_scale,
            y=Operand(u, channels, self.tables[norm] if normed and norm is not None else None),
            center=gradients.norm.mean,
            reduction=Reduction(first=gradients, rows=float(pixels)),
        )
        dp = self.data_grad(conv, dy, epilogue, config)
        if conv > 0:
            return None, self.dy(conv - 1, dp, gradients, self.batch(norm))
        if norm is None or not self.needs[0]:
            return dp, dy
        # pre-activation: dx = dy of norm_0 + skip_scale * dz
        source = Source(Operand(dp, channels), int(RAW), False, 0, 0)
        if gradients.table is not None:
            y = u if self.batch(norm) else None
            source = Source(Operand(dp, channels, gradients.table, y), int(GRADIENT), False, 0, 0)
        identity = through_skip is not None
        if source.kind == int(RAW) and not identity:
            return dp, dy
        self.program.barrier()
        dx = torch.empty_like(dp, memory_format=LAST)
        self.pass_over(
            "dx",
            source,
            pixels,
            self.pass_tile(channels),
            Epilogue(
                dx,
                channels,
                residual=Operand(through_skip, channels),
                residual_scale=self.scale(self.skip_scale) if identity else Scale(),
            ),
            EpilogueConfig(residual=int(RAW) if identity else None),
        )
        return dx, dy

    def data_grad(self, conv: int, dy: Source, epilogue: Epilogue, config: EpilogueConfig) -> Tensor:
        """dP of a convolution with its epilogue applied."""
        stage, weight, u = self.spec.convs[conv], self.weight(conv), self.input(conv)
        channels, (h, w) = u.shape[1], self.input_size(conv)
        pixels = u.shape[0] * h * w
        if conv in self.policy.library:
            dp = self.program.call(lambda: library.data_gradient(dy.operand.x, u, weight, stage))
            dp = dp.contiguous(memory_format=LAST)
            if config.trivial:
                return dp
            tile = self.pass_tile(channels)
            blocks = -(-channels // tile.columns)
            self.program.barrier()
            self.pass_over(
                f"{self.name(conv)}: dz",
                Source(Operand(dp, channels), int(RAW), False, h, w),
                pixels,
                tile,
                self.with_partials(epilogue, dp, config, tile, blocks, channels),
                config,
            )
            return dp
        dp, groups = self.activation(channels, (h, w)), stage.groups
        tile = tuning.convolution(
            self.policy.chip, dp.dtype, pixels, channels // groups, dy.operand.channels // groups, groups,
            int(dy.computed) + (config.mask != int(UNMASKED) or config.reduce != int(NONE)),
        )  # fmt: skip
        blocks = groups * -(-(channels // groups) // tile.columns)
        self.program.phase(
            f"{self.name(conv)}: data gradient",
            self.config(conv, tile, dy, True, config),
            Convolution(
                dy.operand, dy.height, dy.width, weight, self.strides(conv), dp.shape[0], h, w, groups,
                dy.operand.channels // groups, channels // groups,
                self.with_partials(epilogue, dp, config, tile, blocks, channels),
            ),
            tile,
            blocks * -(-pixels // tile.rows),
        )  # fmt: skip
        return dp

    def with_partials(
        self, epilogue: Epilogue, out: Tensor, config: EpilogueConfig, tile: tuning.Tile, blocks: int, channels: int
    ) -> Epilogue:
        """The epilogue with its output and, where it reduces, with room for the partials."""
        reduction = epilogue.reduction
        if config.reduce != int(NONE):
            reduction = self.reduction(tile, blocks, channels, int(reduction.rows), first=reduction.first)
        else:
            reduction = Reduction()
        return epilogue._replace(out=out, reduction=reduction)

    def weight_grad(self, conv: int, dy: Source) -> None:
        if not self.wants(conv, 0):
            return
        stage, weight, source = self.spec.convs[conv], self.weight(conv), self.source(conv)
        name = f"{self.name(conv)}: weight gradient"
        if conv in self.policy.library:
            p = self.materialize(f"{self.name(conv)}: input", source)
            grad = self.program.call(lambda: library.weight_gradient(dy.operand.x, p, weight, stage))
            self.grads[3 + 6 * conv] = grad.contiguous(memory_format=suggest_memory_format(weight))
            return
        dweight = self.grads[3 + 6 * conv] = torch.empty_like(weight, memory_format=suggest_memory_format(weight))
        groups, (k, c, r, s), (h, w) = stage.groups, weight.shape, self.sizes[conv]
        pixels = self.x.shape[0] * h * w
        heavy = dy.computed or source.computed
        tile = tuning.weight_gradient(self.policy.chip, weight.dtype, pixels, k // groups, c, r * s, groups, heavy)
        tiles = groups * -(-(k // groups) // tile.rows) * r * s * -(-c // tile.columns)
        self.program.phase(
            name,
            WeightGradientConfig(
                (r, s), *stage.geometry, dy.kind, source.kind, source.relu, tile.rows, tile.columns, tile.depth,
                tile.splits, tile.stages, self.precision, upcasts(weight.dtype),
            ),
            WeightGradient(
                dy.operand, self.x.shape[0], h, w, source.operand, source.height, source.width, dweight,
                _strides(dweight), groups, k // groups, c,
                self.floats(tile.splits, dweight.numel()) if tile.splits > 1 else None,
                self.program.tickets(tiles) if tile.splits > 1 else None,
            ),
            tile,
            tiles * tile.splits,
        )  # fmt: skip


# --- evaluation ------------------------------------------------------------------------------------------------------


def infer(
    x: Tensor,
    pre: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skip_scale: Tensor | None,
    spec: BlockSpec,
    policy: Policy,
) -> Tensor:
    """The block with its norms folded into weights and biases. pre: the table of a leading norm."""
    flat: list[Tensor | None] = []
    for weight, bias in zip(weights, biases, strict=True):
        flat += [weight, bias, None, None, None, None]
    block = Block(folded_spec(spec, pre is not None), (x, None, skip_scale, *flat), policy)
    if pre is not None:
        block.tables[0] = pre
    last, s = block.last, block.projection
    if spec.projection is not None:
        block.y[s] = block.convolve(s, biases[s], {}, EpilogueConfig())
    chains = _chains(block)
    for conv in range(last + 1):
        if conv > 0 or (conv == last and spec.projection is not None):
            block.program.barrier()
        relu = spec.stages[conv].act == "relu" if not block.pre else conv < last and spec.stages[conv + 1].act == "relu"
        if chains and conv == last - 1:
            between = relu
            continue
        residual: dict[str, Any] = {}
        if conv == last and spec.skip != "none":
            skip = block.x if spec.skip == "identity" else _given(block.y[s])
            residual["residual"] = Operand(skip, skip.shape[1])
            if spec.skip == "identity":
                residual["residual_scale"] = block.scale(skip_scale)
        config = EpilogueConfig(int(RAW) if residual else None, relu)
        if chains and conv == last:
            block.y[conv] = block.chain(conv, between, residual, config)
        else:
            block.y[conv] = block.convolve(conv, biases[conv], residual, config)
    block.program.run()
    return _given(block.y[last]).contiguous(memory_format=output_format(x, weights, spec))


def _chains(block: Block) -> bool:
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


def folded_spec(spec: BlockSpec, pre: bool) -> BlockSpec:
    """The spec whose norms are gone: activations that stand in an epilogue are no prologue's business."""
    stages = []
    for i, stage in enumerate(spec.stages):
        leads = spec.order == "pre" and i == 0
        stages.append(
            StageSpec(
                stage.stride, stage.padding, stage.dilation, stage.groups, leads and pre, False, stage.eps,
                stage.act if leads else "identity",
            )
        )  # fmt: skip
    projection = spec.projection
    if projection is not None:
        projection = StageSpec(*projection.geometry, projection.groups, norm=False, act="identity")
    return BlockSpec(tuple(stages), spec.skip, projection, spec.order, spec.memory)
