"""Evaluation folds each normalisation into its convolution; the result is kept until a tensor changes.

    norm(conv(x, w, c)) = conv(x, w * a) + (c * a + b),   a = gamma / sqrt(var + eps),   b = beta - mean * a

The result is kept with the parameters (`params.Kept`) while their fingerprint holds: addresses, version counters and,
on the CPU, values. Of each weight 1 KiB is compared, of each norm everything, and after any optimizer's step every
value. So writes that move no version counter are seen too: those of fused optimizers and collectives, through
``tensor.data`` or a NumPy array. Not seen is such a write to a few elements of a weight; on other devices, any such
write except an optimizer's. Parameters that fully_shard gathers for each call are compared whole; on other devices
nothing of theirs is kept. A fused module drops what is kept when it changes between training and evaluation.

Weights that oneDNN will run are also converted to its blocked layout, once instead of at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from resnet_fused.ops import operators
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.spec.facts import NONE, facts

T = TypeVar("T")
Affine = tuple[Tensor, Tensor]
# With few pixels (`operators.few_pixels`) a plain 1x1 weight is multiplied as a matrix. While the weight is small that
# is faster than creating a oneDNN convolution; a larger one is read faster in oneDNN's layout.
SMALL_WEIGHT = 1 << 16


@dataclass(frozen=True)
class FoldedBlock:
    """What `operators.residual_block_infer` takes: weights and biases in x's dtype, the rest in at least float32."""

    weights: list[Tensor]  # opaque where packed
    biases: list[Tensor | None]
    pre: Affine | None
    branch_scale: Tensor | None  # where an activation stands before it
    skip_scale: Tensor | None
    channels_last: bool  # what the weights before packing make of a contiguous x
    finite: bool  # on the CPU, where oneDNN's ReLU would make zeros of NaN; elsewhere not looked at


class Steps:
    """Counts the steps of every optimizer in the process."""

    taken = 0


def _count(*_: Any) -> None:
    Steps.taken += 1


register_optimizer_step_post_hook(_count)


@dataclass
class _Kept:
    """What was folded, its key, and the state of the tensors at that time."""

    spec: BlockSpec
    key: tuple[Any, ...]
    samples: int
    everything: int | None
    steps: int
    made: Any


def folded(source: BlockParams, x: Tensor, spec: BlockSpec, pack: bool = True) -> FoldedBlock:
    """The block's tensors with every foldable normalisation and scale folded in, for inputs like x.

    source: the parameters as the caller owns them, not copies cast for one call.
    pack: into oneDNN's layout, where it will run them.
    """
    packs = pack and x.device.type == "cpu" and operators.has_post_ops(x)
    key = ("folded", x.dtype, x.device, packs, _few(x))
    return kept_or_made(source, x, spec, key, lambda: _fold(source, x, spec, packs))


def kept_or_made(source: BlockParams, x: Tensor, spec: BlockSpec, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` makes of the parameters for inputs like x: the last result while nothing has changed since.

    key: what it depends on beside tensors and spec.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return make()  # into the graph, so that its replays see the weights of their time
    if source.gathered and x.device.type != "cpu":
        return make()
    samples = operators.fingerprint(source.tensors, "everything" if source.gathered else "samples")
    if samples is None:
        return make()
    kept: _Kept | None = source.kept.folded
    if (
        kept is not None
        and kept.samples == samples
        and kept.key == key
        and (kept.spec is spec or kept.spec == spec)
        and (kept.steps == Steps.taken or _survives(kept, source, x))
    ):
        return kept.made
    steps, everything = Steps.taken, operators.fingerprint(source.tensors, "everything")
    made = make()
    source.kept.folded = _Kept(spec, key, samples, everything, steps, made)
    return made


def kept(source: BlockParams, spec: BlockSpec, key: tuple[Any, ...]) -> Any:
    """What `kept_or_made` made last, if it was for this spec and key and nothing has changed since; else None."""
    found: _Kept | None = source.kept.folded
    if found is None or source.gathered or found.key != key or found.spec != spec or found.steps != Steps.taken:
        return None
    return found.made if found.samples == operators.fingerprint(source.tensors, "samples") else None


def _survives(kept: _Kept, source: BlockParams, x: Tensor) -> bool:
    """Whether the optimizer step taken since then was another model's."""
    steps = Steps.taken
    if x.device.type != "cpu" or operators.fingerprint(source.tensors, "everything") != kept.everything:
        return False
    kept.steps = steps
    return True


@torch.no_grad()
def _fold(params: BlockParams, x: Tensor, spec: BlockSpec, packs: bool) -> FoldedBlock:
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = [affine(s, p, precision) for s, p in zip(spec.convs, params.convs, strict=True)]
    pre = norms[0] if spec.order == "pre" else None
    last, keeps_branch_scale = len(spec.stages) - 1, facts(spec).join == "branch"
    weights, biases = [], []
    for i, (p, conv) in enumerate(zip(params.convs, facts(spec).convs, strict=True)):
        scale: Scale = 1.0
        if i > last:
            scale = params.skip_scale
        elif i == last and not keeps_branch_scale:
            scale = params.branch_scale
        norm = None if conv.output_stage == NONE else norms[conv.output_stage]
        w, c = _fold_conv(p, norm, scale, precision)
        weights.append(w.to(x.dtype))
        biases.append(None if c is None else c.to(x.dtype))
    contiguous = torch.empty(x.shape, device="meta")
    channels_last = operators.result_format(contiguous, weights, spec) == torch.channels_last
    made = [t for t in (*weights, *biases, *(pre or ())) if t is not None]
    finite = x.device.type != "cpu" or all(bool(t.isfinite().all()) for t in made)
    if packs and finite:
        weights = _pack(weights, x, spec)
    branch_scale = unless_one(params.branch_scale, x, precision) if keeps_branch_scale else None
    skip_scale = unless_one(params.skip_scale, x, precision) if spec.skip == "identity" else None
    return FoldedBlock(weights, biases, pre, branch_scale, skip_scale, channels_last, finite)


def unless_one(scale: Scale, x: Tensor, precision: torch.dtype) -> Tensor | None:
    """A scale, flat and in `precision`, unless it does nothing."""
    if isinstance(scale, float) and scale == 1.0:
        return None
    return torch.as_tensor(scale, dtype=precision, device=x.device).detach().reshape(-1)


def affine(stage: StageSpec, p: StageParams, precision: torch.dtype) -> Affine | None:
    """norm(y) = a y + b with the running statistics; None without a norm."""
    if not stage.norm:
        return None
    assert p.running_mean is not None and p.running_var is not None  # checked by validation
    a = torch.rsqrt(p.running_var.to(precision) + stage.eps)
    if p.norm_weight is not None:
        a = a * p.norm_weight.to(precision)
    b = -p.running_mean.to(precision) * a
    return a, b if p.norm_bias is None else b + p.norm_bias.to(precision)


def _fold_conv(
    p: StageParams, norm: Affine | None, scale: Scale, precision: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    # detached: what is kept must not hold the parameter itself, whose end ends it
    w, c = p.weight.detach().to(precision), None if p.bias is None else p.bias.to(precision)
    if norm is not None:
        a, b = norm
        w, c = w * a.view(-1, 1, 1, 1), b if c is None else c * a + b
    if isinstance(scale, Tensor) or scale != 1.0:
        s = torch.as_tensor(scale, dtype=precision, device=w.device).reshape(-1)
        w, c = w * s.view(-1, 1, 1, 1), None if c is None else c * s
    return w, c


def _few(x: Tensor) -> bool:
    return x.shape[0] * x.shape[2] * x.shape[3] <= operators.few_pixels()


def _pack(weights: list[Tensor], x: Tensor, spec: BlockSpec) -> list[Tensor]:
    """The weights in the layout that oneDNN prefers for inputs of x's size; other sizes work, with a reorder."""
    few = _few(x)
    packed, shape = [], list(x.shape)
    for i, (stage, weight) in enumerate(zip(spec.convs, weights, strict=True)):
        source = list(x.shape) if i == len(spec.stages) else shape
        stride, padding, dilation = stage.geometry
        convolved = source
        if stage.pads_values:  # written out before the convolution
            convolved = [*source[:2], source[2] + 2 * padding[0], source[3] + 2 * padding[1]]
            padding = (0, 0)
        if not (few and weight.shape[2:] == (1, 1) and weight.numel() <= SMALL_WEIGHT):
            packed.append(
                torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, stage.groups, convolved)
            )
        else:
            packed.append(weight)
        height, width = stage.output_size((source[2], source[3]), (weight.shape[2], weight.shape[3]))
        shape = [x.shape[0], weight.shape[0], height, width]
    return packed
