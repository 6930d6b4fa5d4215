"""The autograd Functions of the fused operators: what is saved, and which gradients come back.

Saved for a block: x, the other tensors that it was given (under autocast its convolutions' rounded ones), each stage's
convolution output (not those that memory="low" computes again, see `BlockSpec`), and `out`, which is the next block's x
anyway, for the mask of the final activation. Batch statistics are [2, C].
Saved for a batch norm with activation and residual: x, and a bit per value for the activation's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from resnet_fused.ops import norm_operators, operators, sync_batch_norm
from resnet_fused.ops.operators import Tensors
from resnet_fused.params import BlockParams, Scale
from resnet_fused.spec import BlockSpec
from resnet_fused.spec.facts import join_reads
from resnet_fused.spec.tensors import BlockTensors, convolution_places

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from resnet_fused.backends.dispatch import Backend


Blend = Callable[[Sequence[Tensor]], None]


def tensors_of(params: BlockParams, x: Tensor) -> Tensors:
    """As the operators take them."""
    convs = params.convs
    return BlockTensors(
        x,
        _scale(params.branch_scale, x),
        _scale(params.skip_scale, x),
        [p.weight for p in convs],
        [p.bias for p in convs],
        [p.norm_weight for p in convs],
        [p.norm_bias for p in convs],
        [p.running_mean for p in convs],
        [p.running_var for p in convs],
        [p.slope for p in convs],
    )


def needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def trains(spec: BlockSpec, x: Tensor, params: BlockParams) -> bool:
    """Whether a call runs the operators of training: with the batch's statistics, and where a gradient may follow.

    So it does in graphs for other devices than the CPU, in exported ones, and in those that see scales as numbers that
    change: folded weights would not be kept there.
    """
    if spec.batch_stats or needs_grad((x, *params.tensors)):
        return True
    if not torch.compiler.is_compiling():
        return False
    kept = all(isinstance(scale, Tensor) or scale == 1.0 for scale in (params.branch_scale, params.skip_scale))
    return torch.compiler.is_exporting() or x.device.type != "cpu" or not kept


def _scale(scale: Scale, x: Tensor) -> Tensor | None:
    """None stands for 1, which costs nothing."""
    if isinstance(scale, Tensor):
        return scale
    if scale == 1.0:
        return None
    # filled on the device: copied there, it could not be captured in a CUDA graph
    return torch.full((), scale, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


def residual_block(
    spec: BlockSpec, backend: Backend, tensors: Tensors, blend: Blend, rounded: torch.dtype | None = None
) -> Tensor:
    """out, with gradients for each of `tensors`, which are `tensors_of(params, x)`.

    blend:   is given the batch statistics once everything has been computed.
    rounded: autocast's dtype, to which weights and biases of convolutions are cast; their gradients have their own.
    """
    for i, stage in enumerate(spec.convs):
        if stage.batch_stats:  # the running statistics are about to be updated in place, and nothing reads them
            tensors.running_means[i] = tensors.running_vars[i] = None
    given = tensors.flat
    # export_fused: a program for inference, which holds operators and no Function. A compiled graph without gradients
    # needs none either, and Dynamo of torch 2.13 drops the context of one with *tensors where there are exactly two.
    traced = torch.compiler.is_compiling() and not needs_grad(tuple(given))
    if torch.compiler.is_exporting() or traced:
        out, _, batch_stats = backend.forward(spec, tensors, BlockTensors.filled(False, len(spec.convs)))
        blend([stats.detach() for stats in batch_stats])
        return out
    places = tuple(i for i, t in enumerate(given) if t is not None)
    # checkpointing computes a block again and stops it where its last tensor is saved, which is after forward: so the
    # statistics are blended within, as those of a batch norm are. A traced Function cannot write them.
    within = None if torch.compiler.is_compiling() else blend
    present = (t for t in given if t is not None)
    out, *stats = ResidualBlock.apply(spec, backend, len(given), places, within, rounded, *present)
    if within is None:
        blend(stats)
    return out


FIXED = 6  # arguments of ResidualBlock before the tensors


class ResidualBlock(torch.autograd.Function):
    """One residual block; ``apply(spec, backend, count, places, blend, rounded, *tensors)`` gives (out, *batch stats).

    count, places: how many tensors a block has, and which of them `tensors` are (in the order of `BlockTensors.flat`);
    autograd charges for every argument.
    blend:         as for `residual_block`, or None.
    rounded:       as for `residual_block`. Rounding here takes no nodes of autograd, and a weight's gradient comes from
                   its sums in float32. The rounded weights are what is saved, as eager's casts are, so weights may
                   change between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: BlockSpec,
        backend: Backend,
        count: int,
        places: tuple[int, ...],
        blend: Blend | None,
        rounded: torch.dtype | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        wanted = [False] * count
        for place, need in zip(places, ctx.needs_input_grad[FIXED:], strict=True):
            wanted[place] = need
        needs = BlockTensors.of(wanted)
        ctx.masters = ()
        if rounded is not None:
            given, convs = tensors, convolution_places(len(spec.convs))
            tensors = tuple(t.to(rounded) if place in convs else t for place, t in zip(places, given, strict=True))
            ctx.masters = tuple(t for t, cast in zip(given, tensors, strict=True) if t is not cast)
        out, conv_outputs, batch_stats = backend.forward(spec, _placed(count, places, tensors), needs)
        reads_out = join_reads(spec) == "output"
        ctx.save_for_backward(*tensors, out if reads_out else None, *conv_outputs, *batch_stats)
        ctx.spec, ctx.backend, ctx.count, ctx.places, ctx.needs = spec, backend, count, places, needs
        ctx.split = (len(tensors), len(tensors) + 1 + len(conv_outputs))
        ctx.mark_non_differentiable(*batch_stats)
        ctx.set_materialize_grads(False)
        if blend is not None:
            blend(batch_stats)
        return out, *batch_stats

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, (a, b), masters = ctx.saved_tensors, ctx.split, ctx.masters
        tensors = _placed(ctx.count, ctx.places, saved[:a])
        with torch.no_grad():
            grads = ctx.backend.backward(
                ctx.spec,
                dout,
                saved[a],
                list(saved[a + 1 : b]),
                list(saved[b:]),
                tensors,
                ctx.needs,
                masters[0].dtype if masters else None,
            )
            _stride_as(grads.weights, tensors.weights)
        flat = grads.flat
        sources = [dout, *saved[:a], *masters]
        given = refuse_second_derivative("residual_block", [flat[i] for i in ctx.places], sources)
        return *(None,) * FIXED, *given


def _stride_as(grads: list[Tensor | None], weights: list[Tensor | None]) -> None:
    """Gives each gradient its weight's own strides where they differ in dimensions of one value only, as those of 1x1
    kernels may: DistributedDataParallel compares all of them, and warns."""
    if torch.compiler.is_compiling():
        return
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad is None or weight is None or grad.stride() == weight.stride():
            continue
        sizes = zip(grad.shape, grad.stride(), weight.stride(), strict=True)
        if all(size == 1 or given == wanted for size, given, wanted in sizes):
            grads[i] = grad.as_strided(grad.shape, weight.stride())


def _placed(count: int, places: tuple[int, ...], tensors: tuple[Tensor, ...]) -> Tensors:
    """`tensors` at their places among `count`, the others None."""
    flat: list[Tensor | None] = [None] * count
    for place, tensor in zip(places, tensors, strict=True):
        flat[place] = tensor
    return BlockTensors.of(flat)


class MaxPool2d(torch.autograd.Function):
    """Max pooling that saves the position of each maximum within its window, one byte per output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        out, positions = operators.max_pool2d(x, kernel_size, stride, padding)
        ctx.save_for_backward(positions)
        ctx.window = (kernel_size, stride, padding)
        ctx.size = x.shape[2:]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        with torch.no_grad():
            dx = operators.max_pool2d_backward(dout, positions, *ctx.size, *ctx.window)
        return *refuse_second_derivative("max_pool2d", [dx], [dout]), None, None, None


class BatchNormAct(torch.autograd.Function):
    """act(batch_norm(x) + residual); ``apply(x, residual, weight, bias, mean, var, count, eps, relu, group, blend)``.

    count: the values per channel behind mean and var, which belong to the batch (of the group's processes, if one is
           given); None where they are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int | None,
        eps: float,
        relu: bool,
        group: ProcessGroup | None,
        blend: Callable[[], None] | None,
    ) -> Tensor:
        if x.numel() == 0:  # one process of a group may have nothing to do but to take part in the others' sums
            out, mask = torch.empty_like(x), None
        else:
            out, bits = norm_operators.normalize_act(x, mean, var, weight, bias, residual, eps, relu, save_mask=relu)
            mask = bits if relu else None
        # frozen and without parameters to train, backward is dz * scale
        reads_x = count is not None or any(t is not None and t.requires_grad for t in (weight, bias))
        ctx.save_for_backward(x if reads_x else None, mask, weight, bias, mean, var)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        if blend is not None:
            blend()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, bias, mean, var = ctx.saved_tensors
        with torch.no_grad():
            grads = BatchNormAct._gradients(ctx, dout, dout if x is None else x, mask, weight, bias, mean, var)
        grads = refuse_second_derivative("batch_norm_act", grads, [dout, x, weight])
        return *grads, None, None, None, None, None, None, None

    @staticmethod
    def _gradients(
        ctx: Any,
        dout: Tensor,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> list[Tensor | None]:
        """Of x, residual, weight, bias. Those of weight and bias are this process's own, as in nn.SyncBatchNorm."""
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        through_statistics = needs_x and ctx.count is not None
        empty = x.numel() == 0
        dx = d_weight = d_bias = sums = None
        if needs_weight or needs_bias or through_statistics:
            if empty:
                sums = x.new_zeros((2, x.shape[1]), dtype=torch.float64)
            else:
                sums = norm_operators.normalize_act_backward_reduce(dout, mask, x, mean)
            if needs_weight and weight is not None:
                d_weight = (sums[1] * (var.double() + ctx.eps).rsqrt()).to(weight.dtype)
            if needs_bias and bias is not None:
                d_bias = sums[0].to(bias.dtype)
            if through_statistics and ctx.group is not None:
                sums = sync_batch_norm.add_up(sums, ctx.group)
        dz: Tensor | None = dout
        masks = needs_residual and mask is not None
        if empty:
            dx = torch.empty_like(x)
        elif needs_x or masks:
            count = float(ctx.count) if through_statistics else 0.0
            dx, masked = norm_operators.normalize_act_backward_apply(
                dout, mask, x, mean, var, weight, sums if through_statistics else None, count, ctx.eps, save_dz=masks
            )
            dz = masked if masks else dout
        return [dx if needs_x else None, dz if needs_residual else None, d_weight, d_bias]


def refuse_second_derivative(
    name: str, grads: list[Tensor | None], sources: list[Tensor | None]
) -> list[Tensor | None]:
    """The gradients; under create_graph, tied to what they depend on by a node that explains itself when asked."""
    if not torch.is_grad_enabled():
        return grads
    differentiable = [t for t in sources if t is not None and t.requires_grad]
    present = [g for g in grads if g is not None]
    tied = iter(_SecondDerivative.apply(name, len(present), *present, *differentiable))
    return [None if g is None else next(tied) for g in grads]


class _SecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise RuntimeError(
            f"resnet_fused has no second derivative of {ctx.name}; "  # type: ignore[attr-defined]
            "use backend='eager' (or unfuse the model) where a gradient is differentiated again"
        )
