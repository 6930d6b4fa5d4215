"""Fused blocks as functions of tensors: the public operations beneath the modules.

Data path: functional -> autograd -> operators -> kernels. Modules are unknown here, but for the batch norm whose
statistics `batch_norm_act` updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from resnet_fused.backends import compiled, dispatch, native
from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import require_no_hooks
from resnet_fused.ops import (
    autograd,
    gated_block,
    operators,
    reference,
    running_stats,
    split_block,
    validation,
)
from resnet_fused.ops.gate import Gate, LayeredGate
from resnet_fused.ops.norm_act import norm_act
from resnet_fused.params import BlockParams, StageParams
from resnet_fused.spec import Activation, BlockSpec, Memory, StageSpec, batch_norm
from resnet_fused.spec.activations import IDENTITY, RELU, activation


class Pool(NamedTuple):
    """Max pooling behind a block."""

    kernel_size: int
    stride: int
    padding: int


def residual_block(
    x: Tensor,
    params: BlockParams,
    spec: BlockSpec,
    *,
    gate: Gate | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A whole residual block, forward and (through autograd) backward, as one operator each.

    x:       [N, C, H, W]; float32, float64, bfloat16 or float16; channels_last is the fast layout, contiguous is
             accepted. Under ``torch.autocast`` x and the convolution weights are cast as eager does.
    params:  tensors on x's device; convolution weights in x's dtype, norm tensors in x's dtype or float32.
    spec:    what to compute (formula: `resnet_fused.spec`). Stages with `batch_stats` normalise with the batch and
             update `running_mean`, `running_var` and `num_batches_tracked` in place, after everything succeeded.
             Keep params and spec for many calls: what is known of them is kept with them.
    gate:    what the branch is multiplied with before the addition: a factor for each image and channel [N, C_out], for
             each image [N] or [N, 1] (stochastic depth, a mask), or a function that computes it from the branch's mean
             over pixels, [N, C_out] in x's dtype (squeeze-excitation, ECA). It receives gradients. On the CPU the mean
             comes from the pass that gathers the last norm's statistics, and the product from the one that adds;
             elsewhere PyTorch's own operations follow the fused chain.
    residual: [N, C_out, H', W'] to add in place of a skip path; spec.skip has to be "none". It may have another dtype,
             and receives a gradient. On the CPU it is added by the pass that normalises.
    backend: "auto", or a name from `resnet_fused.backends()`.

    Returns [N, C_out, H', W'] in x's dtype; channels_last if x or the first weight is, as PyTorch's convolution.

    Raises ValueError (shapes, one value per channel in training, unknown backend), TypeError (dtypes),
    BackendError (a backend asked for by name cannot run it). Second derivatives raise RuntimeError.
    """
    spec = spec.of_constants()
    if gate is not None or residual is not None:
        return _gated_block(x, params, spec, gate, residual, backend)
    return _residual_block(x, params, spec, backend, None)


def residual_block_max_pool2d(
    x: Tensor,
    params: BlockParams,
    spec: BlockSpec,
    kernel_size: int,
    stride: int,
    padding: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """``max_pool2d(residual_block(x, params, spec), ...)``, as a ResNet's stem has it.

    In evaluation without autograd the CPU's engine pools what it has just computed; otherwise it is these two calls.
    Arguments and errors are theirs.
    """
    pool, spec = Pool(kernel_size, stride, padding), spec.of_constants()
    if spec.skip != "none" or type(x) is not Tensor or 2 * padding > kernel_size:
        return max_pool2d(residual_block(x, params, spec, backend=backend), *pool, backend=backend)
    return _residual_block(x, params, spec, backend, pool)


def _residual_block(x: Tensor, params: BlockParams, spec: BlockSpec, backend: str, pool: Pool | None) -> Tensor:
    validation.check_input(x)
    dtype = autocast_dtype(x)
    refusal = refuses(x, params, spec)
    split = splits(x, params, spec)
    if split is not None and _takes_split(backend, x, params, refusal):
        out = _split_block(x, params, spec, None, None, backend)
        return out if pool is None else max_pool2d(out, *pool)
    if dtype is not None and refusal is not _MIXES and split is None:
        x = x.to(dtype)
    counts = validation.check_once(x, params, spec, dtype)
    chosen = dispatch.select(backend, x, params, spec, refusal)
    pool_backend = "eager" if backend == "eager" else "auto"  # one asked for by name may have no pooling
    if chosen is None:
        out = reference.residual_block(x, params, spec)
    elif _evaluates(chosen, spec, x, params):
        if torch.compiler.is_compiling():
            return compiled.evaluate(x, params, spec, () if pool is None else pool)
        if pool is not None and isinstance(chosen, native.NativeBackend):
            validation.check_window(_result_shape(x, params, spec), *pool)
            pooled = chosen.infer_pooled(x, params, spec, pool)
            if pooled is not None:
                return pooled
        folded = chosen.infer(x, params, spec)
        # what is not finite is computed in PyTorch's own order of operations, on which its NaN and infinities depend
        out = reference.residual_block(x, params, spec) if folded is None else folded
    else:
        if dtype is not None and torch.compiler.is_compiling():  # whose casts of weights the graph's compiler can see
            params, dtype = _autocast(params, dtype), None
        blend = partial(running_stats.update, params, spec, counts)
        out = autograd.residual_block(spec, chosen, autograd.tensors_of(params, x), blend, dtype)
    return out if pool is None else max_pool2d(out, *pool, backend=pool_backend)


def _evaluates(chosen: dispatch.Backend, spec: BlockSpec, x: Tensor, params: BlockParams) -> bool:
    """Whether the backend's evaluation runs, with what it folds and keeps; in a graph only native's does."""
    if autograd.trains(spec, x, params) or type(x) is not Tensor:
        return False
    return isinstance(chosen, native.NativeBackend) or not torch.compiler.is_compiling()


def _gated_block(
    x: Tensor, params: BlockParams, spec: BlockSpec, gate: Gate | None, residual: Tensor | None, backend: str
) -> Tensor:
    """The chain and the projection as blocks of their own, then the join with its gate or a skip path that is given."""
    validation.check_input(x)
    dtype = autocast_dtype(x)
    refusal = refuses(x, params, spec, gate, residual)
    split = splits(x, params, spec)
    if split is not None and _takes_split(backend, x, params, refusal):
        return _split_block(x, params, spec, gate, residual, backend)
    if dtype is not None and refusal is not _MIXES and split is None:
        x = x.to(dtype)
    validation.check_once(x, params, spec, dtype)
    if residual is not None:
        _check_residual(x, params, spec, residual)
    if not dispatch.takes_gate(backend, x, refusal):
        return reference.residual_block(x, params, spec, gate, residual)
    parts = gated_block.parts(params, spec)
    native_join = gated_block.has_join(x)
    if residual is not None and residual.dtype != x.dtype:
        if spec.in_place_add:
            residual = residual.to(x.dtype)
        else:
            native_join = False  # the sum has the wider dtype
    if native_join and gate is None and residual is not None:
        out = _evaluated_with(x, params, spec, residual, backend)
        if out is not None:
            return out
    if native_join and gate is None and residual is not None and parts.act == IDENTITY:
        # a bare sum costs less as ATen's than the join, whose Functions are for gates
        return residual_block(x, params, spec, backend=backend).add_(residual)
    leaves_norm = native_join and autograd.trains(spec, x, params)
    last = x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    bare = residual is None and not leaves_norm and gated_block.only_multiplies(params, spec, parts)
    if native_join:
        if not torch.compiler.is_compiling():  # whose graphs have no use for exact strides
            form = operators.result_format(x, [p.weight for p in params.convs], spec)
        x = x.contiguous(memory_format=torch.channels_last)  # once, rather than in each pass of the join
    y = residual_block(x, *(parts.chain if leaves_norm else parts.evaluated), backend=backend)
    skip = residual
    if spec.skip != "none":
        skip = x if parts.projection is None else residual_block(x, *parts.projection, backend=backend)
    if not native_join:
        return parts.act(reference.join(y, skip, params, spec, gate), parts.slope)
    if not leaves_norm and isinstance(gate, LayeredGate) and gated_block.reads_layers(y, params, gate):
        out = gated_block.evaluated(y, skip, parts, gate)
    elif last and bare and gate is not None:
        out = gated_block.multiplied(y, gate)
    else:
        out = gated_block.join(y, skip, params, parts, gate, leaves_norm)
    return out.contiguous(memory_format=form)


def _evaluated_with(x: Tensor, params: BlockParams, spec: BlockSpec, residual: Tensor, backend: str) -> Tensor | None:
    """The block in evaluation, whose last convolution adds the residual as it is written; None where it cannot."""
    plain = type(x) is Tensor and type(residual) is Tensor and residual.dtype == x.dtype
    scaled = isinstance(params.skip_scale, Tensor) or params.skip_scale != 1.0
    if not plain or scaled or torch.compiler.is_compiling() or autograd.trains(spec, x, params):
        return None
    chosen = dispatch.select(backend, x, params, spec)
    if autograd.needs_grad((residual,)) or not isinstance(chosen, native.NativeBackend):
        return None
    return chosen.infer(x, params, spec, residual)


def _check_residual(x: Tensor, params: BlockParams, spec: BlockSpec, residual: Tensor) -> None:
    shape = _result_shape(x, params, spec)
    if spec.skip != "none":
        raise ValueError(f"a residual is given and spec.skip is {spec.skip!r}; accepted with a residual: 'none'")
    if tuple(residual.shape) != shape or residual.device != x.device:
        raise ValueError(
            f"residual is {tuple(residual.shape)} on {residual.device}, the branch gives {shape} on {x.device}; they "
            "are added, so they must be alike"
        )


def splits(x: Tensor, params: BlockParams, spec: BlockSpec) -> str | None:
    """Why this block is computed in pieces now (`ops.split_block`), or None."""
    return split_block.reason_to_split(params, spec, lambda: autocast_dtype(x) not in (None, torch.float32))


def _takes_split(backend: str, x: Tensor, params: BlockParams, refusal: str | None) -> bool:
    """Whether fused pieces run: an empty batch does where another process may wait for its part in the statistics."""
    dispatch.check_name(backend)
    return refusal is None and backend != "eager" and (x.numel() > 0 or params.shares_batch)


def _split_block(
    x: Tensor, params: BlockParams, spec: BlockSpec, gate: Gate | None, residual: Tensor | None, backend: str
) -> Tensor:
    dtype = autocast_dtype(x)
    validation.check(x, params, spec, dtype)
    if residual is not None:
        _check_residual(x, params, spec, residual)

    def fused(u: Tensor, chain: BlockParams, of_chain: BlockSpec) -> Tensor:
        return residual_block(u, chain, of_chain, backend=backend)

    return split_block.run(x, params, spec, gate, residual, fused, dtype or x.dtype)


def _result_shape(x: Tensor, params: BlockParams, spec: BlockSpec) -> tuple[int, int, int, int]:
    size = x.shape[2], x.shape[3]
    for stage, tensors in zip(spec.stages, params.stages, strict=True):
        size = stage.output_size(size, (tensors.weight.shape[2], tensors.weight.shape[3]))
    return (x.shape[0], params.stages[-1].weight.shape[0], *size)


def conv_bn_act(
    x: Tensor, params: StageParams, stage: StageSpec, *, memory: Memory = "default", backend: str = "auto"
) -> Tensor:
    """act(norm(conv(x))): the chain of one, e.g. a ResNet's stem. Arguments and errors as `residual_block`."""
    return residual_block(x, BlockParams((params,)), BlockSpec((stage,), memory=memory), backend=backend)


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int, *, backend: str = "auto") -> Tensor:
    """``F.max_pool2d`` that keeps one byte per output for backward where PyTorch keeps x and int64 indices.

    x: [N, C, H, W], any dtype of `residual_block`. Windows of at most 255 positions; NaN propagates, the first
    maximum in row order receives the gradient, both as in PyTorch. Raises ValueError for a bad shape.
    """
    validation.check_pool(x, kernel_size, stride, padding)
    if dispatch.select_pool(backend, x, differentiated_otherwise(x, ())) is None:
        return torch.nn.functional.max_pool2d(x, kernel_size, stride, padding)
    return autograd.MaxPool2d.apply(x, kernel_size, stride, padding)


def batch_norm_act(
    x: Tensor,
    bn: nn.Module,
    *,
    residual: Tensor | None = None,
    act: Activation | str = "relu",
    backend: str = "auto",
) -> Tensor:
    """``act(bn(x) + residual)`` in one pass after the statistics; backward keeps x and one bit per output.

    x:        [N, C, H, W], any dtype of `residual_block` and any memory format; channels_last is the fast one.
    bn:       an nn.BatchNorm2d or nn.SyncBatchNorm. What its own forward would do with `training`, `momentum`, `eps`,
              `track_running_stats` and its buffers is done, the buffers being written after everything succeeded. Its
              tensors have x's dtype or, for an x of 16 bits, float32. In training, with torch.distributed initialised,
              SyncBatchNorm takes its statistics over its process group (on CPU tensors too); a process may come with
              an empty batch.
    residual: x's shape, or None.
    act:      an `Activation` or its name (`spec.activations.KINDS`); prelu, whose slope is learned, is not taken. Those
              other than relu and identity keep their output, or the residual, in place of the bits; they have kernels
              on the CPU, and none behind a synchronised norm.
    backend:  "auto", or a name from `resnet_fused.backends()`. A residual of another dtype than x's, and a bn with
              hooks, run in plain PyTorch.

    Returns x's shape, dtype and memory format. Gradients for x, residual and bn's weight and bias (SyncBatchNorm: each
    process's own share, as DistributedDataParallel expects).

    Raises ValueError (shapes, devices, one value per channel in training, unknown act or backend), TypeError (dtypes,
    another class of bn), BackendError (a backend asked for by name cannot run it). Second derivatives raise
    RuntimeError.
    """
    norm = batch_norm.read(bn)
    act = activation(act)
    validation.check_batch_norm_act(x, norm, residual, act)
    alone_and_empty = x.numel() == 0 and norm.group is None  # PyTorch's behaviour to keep
    if alone_and_empty or dispatch.select_norm(backend, x, _norm_refusal(x, bn, residual, act)) is None:
        return reference.batch_norm_act(x, bn, residual, act)
    return norm_act(x, norm, residual, act)


_MIXES = "under autocast x is wider than the convolutions and reaches the block's norm or skip path as it is"


def _norm_refusal(x: Tensor, bn: nn.Module, residual: Tensor | None, act: Activation) -> str | None:
    """Why only PyTorch's own operations compute this call, or None."""
    if act not in (IDENTITY, RELU) and not gated_block.has_join(x):
        return f"on {x.device.type} the operators of a batch norm on its own have relu and identity, act is {act.name}"
    if act not in (IDENTITY, RELU) and type(bn) is nn.SyncBatchNorm and bn.training:
        return f"of the activations behind a SyncBatchNorm the operators have relu and identity, act is {act.name}"
    reason = differentiated_otherwise(x, (residual, *bn.parameters(recurse=False)))
    if reason is not None:
        return reason
    if residual is not None and residual.dtype != x.dtype:
        return f"x is {x.dtype}, residual is {residual.dtype}, and their sum has the wider dtype"
    try:
        require_no_hooks("bn", bn)
    except NotFusable as reason:
        return str(reason)
    return None


def refuses(
    x: Tensor, params: BlockParams, spec: BlockSpec, gate: Gate | None = None, residual: Tensor | None = None
) -> str | None:
    """Why only PyTorch's own operations compute this block, whatever the backend, or None."""
    if (split := splits(x, params, spec)) is not None:
        if not gated_block.has_join(x):
            return f"{split}; the pieces run on the CPU only"
        return differentiated_otherwise(x, (*params.tensors, residual))
    if gate is not None and (reason := gated_block.reason_against(spec)) is not None:
        return reason
    if _keeps_width(spec) and autocast_dtype(x) not in (None, x.dtype):
        return _MIXES
    return differentiated_otherwise(x, (*params.tensors, residual))


def as_convolved(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, gives to its convolutions."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def differentiated_otherwise(x: Tensor, others: Iterable[Tensor | None]) -> str | None:
    """Why only PyTorch's own operations compute this call: derivatives that the kernels do not have; or None."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "within a transform of torch.func, whose derivatives and batches the kernels do not have"
    if forward_ad._current_level >= 0:
        given = [x, *(t for t in others if t is not None)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in given):
            return "x or a parameter has a tangent, and the kernels have no forward-mode derivative"
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, where it is on, gives to x's convolutions."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _keeps_width(spec: BlockSpec) -> bool:
    """Whether x, where autocast narrows it for the convolutions, reaches the block's norm or its output as it is."""
    return spec.order == "pre" or (spec.skip == "identity" and not spec.in_place_add)


def _autocast(params: BlockParams, dtype: torch.dtype) -> BlockParams:
    """The convolution tensors in autocast's dtype; norm tensors stay, as in eager."""

    def cast(stage: StageParams) -> StageParams:
        bias = None if stage.bias is None else stage.bias.to(dtype)
        return replace(stage, weight=stage.weight.to(dtype), bias=bias)

    return replace(
        params,
        stages=tuple(map(cast, params.stages)),
        projection=None if params.projection is None else cast(params.projection),
    )
