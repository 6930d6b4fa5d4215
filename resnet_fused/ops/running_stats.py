"""The running statistics of batch normalisation, updated after a block's forward has succeeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from resnet_fused.ops import operators
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec


class Running(Protocol):
    """The running statistics of one batch norm: those of a `StageParams`, or of a `batch_norm.BatchNorm`."""

    @property
    def running_mean(self) -> Tensor | None: ...
    @property
    def running_var(self) -> Tensor | None: ...
    @property
    def num_batches_tracked(self) -> Tensor | None: ...
    @property
    def momentum(self) -> float | None: ...


def update_factor(tensors: Running) -> float:
    """The weight of the new batch: `momentum`, or 1/k in the k-th batch for the cumulative average (None)."""
    if tensors.momentum is not None:
        return tensors.momentum
    if tensors.num_batches_tracked is None:
        return 0.0  # as nn.BatchNorm2d: without a counter the average cannot move
    return 1.0 / (int(tensors.num_batches_tracked) + 1)


def update(params: BlockParams, spec: BlockSpec, counts: Sequence[int], batch_stats: Sequence[Tensor]) -> None:
    """Blend each norm's batch statistics into its running ones, and count the batch, in place.

    counts:      values per channel; the running variance uses the unbiased estimate.
    batch_stats: [2, C] (mean, biased variance) for every stage with `batch_stats`, in the order of `spec.convs`.
    """
    if not spec.batch_stats:
        return
    tracked = [t for s, t in zip(spec.convs, params.convs, strict=True) if s.norm and s.batch_stats]
    if not torch.compiler.is_compiling() and operators.update_running_stats(
        [t.running_mean for t in tracked],
        [t.running_var for t in tracked],
        [t.num_batches_tracked for t in tracked],
        batch_stats,
        [update_factor(t) for t in tracked],
        counts,
    ):
        return
    for tensors, (mean, var), count in zip(tracked, batch_stats, counts, strict=True):
        update_one(tensors, mean, var, count)
        count_one(tensors)


def update_one(tensors: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """Blend one norm's batch statistics [C] into its running ones, in place; arguments as `update`."""
    if tensors.running_mean is None and tensors.running_var is None:
        return
    factor = update_factor(tensors)
    if tensors.running_mean is not None:
        _blend(tensors.running_mean, mean, factor)
    if tensors.running_var is not None:
        _blend(tensors.running_var, var * (count / (count - 1)), factor)


def count_one(tensors: Running) -> None:
    """Increment `num_batches_tracked`, where there is one."""
    if tensors.num_batches_tracked is not None:
        tensors.num_batches_tracked.add_(1)


def _blend(running: Tensor, batch: Tensor, factor: float) -> None:
    if running.dtype == batch.dtype:
        running.lerp_(batch, factor)
    else:  # bf16/fp16 buffers: blend in the statistics' precision, round once
        running.copy_(running.to(batch.dtype).lerp_(batch, factor))
