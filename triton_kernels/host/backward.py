"""Training, backward: the join turns dout into dz, then the two gradients of each convolution, the last one first.

dz is dout times the derivative of the block's last activation. In branch order the activation belongs to the branch, so
the skip path's gradient is dout, and a pass of its own sums what the skip path's norm and scale need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.ops.operators import Tensors
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.activations import IDENTITY
from resnet_fused.spec.facts import NONE, Facts, JoinReads, Needs
from resnet_fused.spec.tensors import BlockTensors

from ..device import reductions
from ..device.convolution import Convolution
from ..device.epilogue import (
    BY_NORM,
    BY_OUT,
    BY_SUM,
    NOTHING,
    OVER_OUTPUT,
    OVER_SKIP,
    OVER_SLOPE,
    UNMASKED,
    Epilogue,
    EpilogueConfig,
)
from ..device.operands import GRADIENT, GRADIENT_ROWS, NORMALIZE, RAW, Operand, Scale
from ..device.reductions import SUMS, Reduction, VectorGradients
from ..device.weight_gradient import WeightGradient, WeightGradientConfig
from . import library, tuning
from .block import LAST, BlockPlan, Source, given, strides, upcasts
from .policies import Policy

MASKS: dict[JoinReads, int] = {
    "nothing": int(UNMASKED),
    "output": int(BY_OUT),
    "sum": int(BY_SUM),
    "branch": int(BY_NORM),
}


def backward(
    spec: BlockSpec,
    facts: Facts,
    dout: Tensor,
    out: Tensor | None,
    conv_outputs: Sequence[Tensor],
    batch_stats: Sequence[Tensor],
    tensors: Tensors,
    needs: Needs,
    policy: Policy,
) -> Tensors:
    """The gradient of each of `tensors`, None where `needs` is false."""
    return _Backward(spec, facts, tensors, needs, policy).run(dout, out, conv_outputs, batch_stats)


@dataclass
class _Later:
    """The gradient of a scale or a slope, computed from its values per channel after the launches.

    name, conv: its place in `BlockTensors`; conv: NONE for the block's own. factor: multiplies the values.
    """

    name: str
    conv: int
    per_channel: Tensor
    parameter: Tensor
    factor: Tensor | None = None

    def put(self, grads: Tensors) -> None:
        values = self.per_channel if self.factor is None else self.per_channel * self.factor.reshape(-1)
        total = values.sum() if self.parameter.numel() == 1 else values
        grad = total.to(self.parameter.dtype).reshape(self.parameter.shape)
        if self.conv == NONE:
            setattr(grads, self.name, grad)
        else:
            getattr(grads, self.name)[self.conv] = grad


class _Backward(BlockPlan):
    def __init__(self, spec: BlockSpec, facts: Facts, tensors: Tensors, needs: Needs, policy: Policy) -> None:
        super().__init__(spec, facts, tensors, policy)
        self.given, self.needs = tensors, needs
        self.grads: Tensors = BlockTensors.filled(None, len(spec.convs))
        self.later: list[_Later] = []

    # --- which gradients --------------------------------------------------------------------------------------------

    def vector_gradients(
        self, conv: int, norm: int, channels: int, factor: Tensor | None = None, dfactor: Tensor | None = None
    ) -> VectorGradients:
        """What follows from the sums of dz and dz * y for y of `conv` (NONE: x) and the norm that reads it.

        factor: the scale behind the norm. dfactor: float64 [channels], for its gradient.
        """
        wants_table = conv == NONE or self.facts.convs[conv].wants_dy
        return VectorGradients(
            self.norm(norm),
            self.scale(factor),
            self.floats(GRADIENT_ROWS, channels) if wants_table and (norm != NONE or factor is not None) else None,
            None if norm == NONE else self.vector("norm_weights", norm),
            None if norm == NONE else self.vector("norm_biases", norm),
            dfactor,
            None if conv == NONE else self.vector("biases", conv),
        )

    def vector(self, name: str, index: int) -> Tensor | None:
        """A buffer [C] for the gradient of one of `BlockTensors`' vectors, None if it is not wanted."""
        if not getattr(self.needs, name)[index]:
            return None
        parameter = given(getattr(self.given, name)[index])
        grad = getattr(self.grads, name)[index] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        return grad

    def per_channel(self, channels: int) -> Tensor:
        return torch.empty(channels, dtype=torch.float64, device=self.x.device)

    def scale_gradient(self, name: str, channels: int) -> Tensor | None:
        """Room for the gradient of branch_scale or skip_scale, None if it is not wanted."""
        scale = getattr(self, name)
        if scale is None or not getattr(self.needs, name):
            return None
        dscale = self.per_channel(channels)
        self.later.append(_Later(name, NONE, dscale, getattr(self.given, name)))
        return dscale

    def slope_gradient(self, stage: int, channels: int, factor: Tensor | None = None) -> Tensor | None:
        """Room for the gradient of a stage's slope, None if it is not wanted. factor: the scale behind it."""
        if stage == NONE or not self.needs.slopes[stage]:
            return None
        dslope = self.per_channel(channels)
        self.later.append(_Later("slopes", stage, dslope, given(self.given.slopes[stage]), factor))
        return dslope

    # --- the steps --------------------------------------------------------------------------------------------------

    def run(
        self, dout: Tensor, out: Tensor | None, conv_outputs: Sequence[Tensor], batch_stats: Sequence[Tensor]
    ) -> Tensors:
        spec, s = self.spec, self.projection
        self.restore(conv_outputs, batch_stats)
        dy, dy_s, dskip = self.join(dout.contiguous(memory_format=LAST), out)
        through_skip = dskip if spec.skip == "identity" else None  # a tensor that nothing will read again is not held
        del dskip
        dp_s: Tensor | None = None
        if dy_s is not None:
            self.plan.barrier()
            dy_s = self.settle("projection: dy", s, dy_s)
            self.weight_grad(s, dy_s)
            if self.facts.convs[s].wants_dp:
                dp_s = self.data_grad(s, dy_s, Epilogue(channels=self.x.shape[1]), EpilogueConfig())
            dy_s = self.y[s] = None
        dx: Tensor | None = None
        for conv in reversed(range(len(spec.stages))):
            if not self.facts.convs[conv].wants_dy:
                break
            self.plan.barrier()
            dy = self.settle(f"{self.name(conv)}: dy", conv, dy)
            self.weight_grad(conv, dy)
            if not self.facts.convs[conv].wants_dp:
                break
            dx, dy = self.step(conv, dy, through_skip, dp_s)
            if conv == self.last:
                self.y[conv] = None  # which may have been recomputed
        self.plan.run()
        if self.needs.x:
            self.grads.x = given(dx).contiguous(memory_format=suggest_memory_format(given(self.given.x)))
        for gradient in self.later:
            gradient.put(self.grads)
        return self.grads

    def restore(self, conv_outputs: Sequence[Tensor], batch_stats: Sequence[Tensor]) -> None:
        """The saved tensors in their places, norm tables, and the outputs that memory="low" did not keep."""
        spec, convs = self.spec, self.facts.convs
        for i, y in zip(self.facts.saved, conv_outputs, strict=True):
            self.y[i] = y.contiguous(memory_format=LAST)
        statistics = iter(batch_stats)
        for i in range(len(spec.convs)):
            if self.batch(i):
                self.statistics[i] = next(statistics)
        again = self.facts.join in ("sum", "branch")  # the argument of the last activation
        read = {conv.input_stage for conv in convs}
        if again:
            read.add(convs[self.last].output_stage)
        if self.facts.join == "sum" and spec.skip == "projection":
            read.add(convs[self.projection].output_stage)
        self.write_tables(sorted(stage for stage in read if self.normed(stage)))
        missing = [i for i, conv in enumerate(convs) if conv.read and self.y[i] is None]
        if missing:
            self.plan.barrier()
            for i in missing:
                if 0 < i < self.projection and i - 1 in missing:  # in a chain of two, y_2 is made of y_1
                    self.plan.barrier()
                self.y[i] = self.convolve(i, {}, EpilogueConfig())
        if missing or again:
            self.plan.barrier()

    def join(self, dout: Tensor, out: Tensor | None) -> tuple[Source, Source | None, Tensor]:
        """dy of the last convolution and of the projection, as prologues make them, and the skip path's gradient."""
        last, s, channels = self.last, self.projection, dout.shape[1]
        norm, norm_s = self.output_norm(last), NONE if self.spec.skip != "projection" else self.output_norm(s)
        branch, masked = self.facts.join == "branch", self.facts.join != "nothing"
        dscale = self.scale_gradient("branch_scale", channels)
        first = self.vector_gradients(last, norm, channels, self.branch_scale, None if branch else dscale)
        second, u = self.skip_gradients(norm_s, channels)
        stage = self.facts.convs[last].output_stage
        dslope = self.slope_gradient(stage, channels, self.branch_scale if branch else None)
        dz = torch.empty_like(dout, memory_format=LAST) if masked else dout
        config = EpilogueConfig(
            act=self.act(stage),
            mask=MASKS[self.facts.join],
            mask_normalizes=norm != NONE,
            s=self.skip_in_argument(norm_s),
            wide=self.wide,
        )
        sums_y = self.y[last] is not None and (norm != NONE or first.dfactor is not None)
        sums = replace(config, sums_y=sums_y, batch=self.batch(norm), batch_s=self.batch(norm_s))
        reduction = Reduction(first=first)
        if branch:
            self.sum_over_skip(dout, second, u, self.batch(norm_s))
            if dscale is not None:
                sums = replace(sums, third=int(OVER_OUTPUT))
                reduction = reduction._replace(second=VectorGradients(dfactor=dscale))
        else:
            reduction = reduction._replace(second=second)
            if u is not None:
                sums = replace(sums, third=int(OVER_SKIP))
        if dslope is not None:
            only = VectorGradients(dfactor=dslope)
            if _wanted(Reduction(second=reduction.second)):  # the third sum is taken
                over_slope = replace(config, third=int(OVER_SLOPE))
                self.join_pass("join: slope", dout, None, out, over_slope, Reduction(second=only))
            else:
                sums, reduction = replace(sums, third=int(OVER_SLOPE)), reduction._replace(second=only)
        if masked or _wanted(reduction):
            self.join_pass("join", dout, dz if masked else None, out, sums, reduction)

        dy, through_skip, dy_s = self.dy(last, dz, first, self.batch(norm)), dout if branch else dz, None
        if self.spec.skip == "projection" and self.facts.convs[s].wants_dy:
            dy_s = self.dy(s, through_skip, second, self.batch(norm_s))
        return dy, dy_s, through_skip

    def skip_gradients(self, norm: int, channels: int) -> tuple[VectorGradients, Tensor | None]:
        """What follows from the sums over the skip path, and the tensor that the second sum reads; None if not wanted.

        norm: of the projection.
        """
        if self.spec.skip == "projection":
            dscale = self.scale_gradient("skip_scale", channels)
            gradients = self.vector_gradients(self.projection, norm, channels, self.skip_scale, dscale)
            return gradients, self.y[self.projection] if norm != NONE or dscale is not None else None
        dscale = self.scale_gradient("skip_scale", channels)
        if dscale is not None and self.spec.skip == "identity":
            return self.vector_gradients(NONE, NONE, channels, self.skip_scale, dscale), self.x
        if dscale is not None:  # a skip scale without a skip path
            dscale.zero_()
        return VectorGradients(), None

    def skip_in_argument(self, norm: int) -> int | None:
        """How the skip path enters the argument of the last activation; None where backward does not recompute it."""
        if self.facts.join != "sum" or self.spec.skip == "none":
            return None
        return int(RAW) if norm == NONE else int(NORMALIZE)

    def sum_over_skip(self, dout: Tensor, gradients: VectorGradients, u: Tensor | None, batch: bool) -> None:
        """Sums what the skip path's norm and scale need, where the skip path's gradient is dout and not dz."""
        if not _wanted(Reduction(first=gradients)):
            return
        channels, pixels = dout.shape[1], dout.numel() // dout.shape[1]
        tile = self.pass_tile(channels)
        reduction = self.reduction(tile, -(-channels // tile.columns), channels, pixels, first=gradients)
        epilogue = Epilogue(None, channels, y=Operand(u, channels), center=gradients.norm.mean, reduction=reduction)
        config = EpilogueConfig(reduce=int(SUMS), sums_y=u is not None, batch=batch, wide=self.wide)
        self.pass_over("join: skip", Source(Operand(dout, channels)), pixels, tile, epilogue, config)

    def join_pass(
        self, name: str, dout: Tensor, dz: Tensor | None, out: Tensor | None, config: EpilogueConfig, sums: Reduction
    ) -> None:
        """A pass over dout with the derivative of the last activation. sums: what is to be made of them."""
        last, s, join = self.last, self.projection, self.facts.join
        channels, pixels = dout.shape[1], dout.numel() // dout.shape[1]
        tile, reduction = self.pass_tile(channels), Reduction()
        if _wanted(sums):
            config = replace(config, reduce=int(SUMS))
            reduction = self.reduction(
                tile, -(-channels // tile.columns), channels, pixels,
                first=sums.first, second=sums.second,
            )  # fmt: skip
        y, skip = Operand(self.y[last], channels), Operand()
        stage = self.facts.convs[last].output_stage
        if join in ("sum", "branch") and self.normed(stage):
            y = y._replace(table=self.tables[stage])
        if config.reads_s:
            skip = Operand(self.x if self.spec.skip == "identity" else self.y[s], channels)
            if config.s == int(NORMALIZE):
                skip = skip._replace(table=self.tables[self.output_norm(s)])
        epilogue = Epilogue(
            dz,
            channels,
            factor=self.scale(self.branch_scale) if join == "sum" else Scale(),
            mask_by=given(out).contiguous(memory_format=LAST) if join == "output" else None,
            y=y,
            center=sums.first.norm.mean,
            s=skip,
            s_scale=self.scale(self.skip_scale) if config.s is not None else Scale(),
            center_s=sums.second.norm.mean,
            slope=self.slope(stage),
            reduction=reduction,
        )
        self.pass_over(name, Source(Operand(dout, channels)), pixels, tile, epilogue, config)

    def dy(self, conv: int, dz: Tensor, gradients: VectorGradients, batch: bool) -> Source:
        """dy of a convolution from dz behind its norm."""
        if gradients.table is None:
            return Source(Operand(dz, dz.shape[1]), int(RAW), IDENTITY, *self.sizes[conv])
        y = self.y[conv] if batch else None
        return Source(Operand(dz, dz.shape[1], gradients.table, y), int(GRADIENT), IDENTITY, *self.sizes[conv])

    def settle(self, name: str, conv: int, dy: Source) -> Source:
        """dy in the form in which the convolution's two gradients read it.

        With a single tap their prologues make it. With R x S taps they would make each element R x S times each and
        read two tensors instead of one, so it is written out.
        """
        height, width = self.kernel(conv)
        if dy.kind == int(RAW) or (height * width == 1 and conv not in self.policy.library):
            return dy
        tensor = self.materialize(name, dy)
        return Source(Operand(tensor, tensor.shape[1]), int(RAW), IDENTITY, dy.height, dy.width)

    def step(
        self, conv: int, dy: Source, through_skip: Tensor | None, dp_s: Tensor | None
    ) -> tuple[Tensor | None, Source]:
        """From dy of a convolution to dy of the one before it, or to dx.

        through_skip: the gradient that an identity skip passes on. dp_s: the projection's gradient of x.
        """
        stage, u = self.facts.convs[conv].input_stage, self.input(conv)
        norm = stage if self.normed(stage) else NONE
        channels, pixels = u.shape[1], u.numel() // u.shape[1]
        residual, residual_scale = None, Scale()
        if conv == 0 and dp_s is not None:
            residual = dp_s
        elif conv == 0 and stage == NONE and through_skip is not None:
            residual, residual_scale = through_skip, self.scale(self.skip_scale)
        act, below = self.act(stage), conv - 1 if conv > 0 else NONE
        gradients = VectorGradients()
        if norm != NONE or (below != NONE and self.needs.biases[below]):
            gradients = self.vector_gradients(below, norm, channels)
        dslope = self.slope_gradient(stage, channels)
        sums = Reduction(first=gradients, second=VectorGradients(dfactor=dslope), rows=float(pixels))
        config = EpilogueConfig(
            residual=int(RAW) if residual is not None else None,
            act=act,
            mask=int(UNMASKED) if act == IDENTITY else int(BY_NORM),
            mask_normalizes=norm != NONE,
            reduce=int(SUMS) if _wanted(sums) else int(reductions.NONE),
            sums_y=norm != NONE,
            third=int(NOTHING) if dslope is None else int(OVER_SLOPE),
            batch=self.batch(stage),
            wide=self.wide,
        )
        epilogue = Epilogue(
            channels=channels,
            residual=Operand(residual, channels),
            residual_scale=residual_scale,
            y=Operand(u, channels, None if norm == NONE else self.tables[norm]),
            center=gradients.norm.mean,
            slope=self.slope(stage),
            reduction=sums,
        )
        dp = self.data_grad(conv, dy, epilogue, config)
        if conv > 0:
            return None, self.dy(conv - 1, dp, gradients, self.batch(stage))
        if stage == NONE or not self.needs.x:
            return dp, dy
        # pre-activation: dx = dy of norm_0 + skip_scale * dz
        source = Source(Operand(dp, channels))
        if gradients.table is not None:
            y = u if self.batch(stage) else None
            source = Source(Operand(dp, channels, gradients.table, y), int(GRADIENT))
        identity = through_skip is not None
        if source.kind == int(RAW) and not identity:
            return dp, dy
        self.plan.barrier()
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
        stage, weight, u = self.spec.convs[conv], self.weights[conv], self.input(conv)
        channels, (h, w) = u.shape[1], self.input_size(conv)
        pixels = u.shape[0] * h * w
        if conv in self.policy.library:
            dp = self.plan.call(lambda: library.data_gradient(dy.operand.x, u, weight, stage))
            dp = dp.contiguous(memory_format=LAST)
            if config.trivial:
                return dp
            tile = self.pass_tile(channels)
            blocks = -(-channels // tile.columns)
            self.plan.barrier()
            self.pass_over(
                f"{self.name(conv)}: dz",
                Source(Operand(dp, channels)),
                pixels,
                tile,
                self.with_partials(epilogue, dp, config, tile, blocks, channels),
                config,
            )
            return dp
        dp, groups = self.activation(channels, (h, w)), stage.groups
        tile = tuning.convolution(
            self.policy.chip, dp.dtype, pixels, channels // groups, dy.operand.channels // groups, groups,
            int(dy.computed) + (config.mask != int(UNMASKED) or config.reduce != int(reductions.NONE)),
        )  # fmt: skip
        blocks = groups * -(-(channels // groups) // tile.columns)
        self.plan.phase(
            f"{self.name(conv)}: data gradient",
            self.config(conv, tile, dy, True, config),
            Convolution(
                dy.operand, dy.height, dy.width, weight, strides(weight), dp.shape[0], h, w, groups,
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
        if config.reduce != int(reductions.NONE):
            reduction = self.reduction(
                tile, blocks, channels, int(reduction.rows), first=reduction.first, second=reduction.second
            )
        else:
            reduction = Reduction()
        return epilogue._replace(out=out, reduction=reduction)

    def weight_grad(self, conv: int, dy: Source) -> None:
        if not self.needs.weights[conv]:
            return
        stage, weight, source = self.spec.convs[conv], self.weights[conv], self.source(conv)
        name = f"{self.name(conv)}: weight gradient"
        if conv in self.policy.library:
            p = self.materialize(f"{self.name(conv)}: input", source)
            grad = self.plan.call(lambda: library.weight_gradient(dy.operand.x, p, weight, stage))
            self.grads.weights[conv] = grad.contiguous(memory_format=suggest_memory_format(weight))
            return
        dweight = self.grads.weights[conv] = torch.empty_like(weight, memory_format=suggest_memory_format(weight))
        groups, (k, c, r, s), (h, w) = stage.groups, weight.shape, self.sizes[conv]
        pixels = self.x.shape[0] * h * w
        heavy = dy.computed or source.computed
        tile = tuning.weight_gradient(self.policy.chip, weight.dtype, pixels, k // groups, c, r * s, groups, heavy)
        tiles = groups * -(-(k // groups) // tile.rows) * r * s * -(-c // tile.columns)
        self.plan.phase(
            name,
            WeightGradientConfig(
                (r, s), *stage.geometry, dy.kind, source.kind, source.act, tile.rows, tile.columns, tile.depth,
                tile.splits, tile.buffers, self.precision, upcasts(weight.dtype),
            ),
            WeightGradient(
                dy.operand, self.x.shape[0], h, w, source.operand, source.height, source.width, dweight,
                strides(dweight), groups, k // groups, c,
                self.floats(tile.splits, dweight.numel()) if tile.splits > 1 else None,
                self.plan.tickets(tiles) if tile.splits > 1 else None,
            ),
            tile,
            tiles * tile.splits,
        )  # fmt: skip


def _wanted(sums: Reduction) -> bool:
    """Whether anything is to be made of sums."""
    return any(part is not None for gradients in (sums.first, sums.second) for part in gradients[2:])
