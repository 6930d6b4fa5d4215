"""Batch statistics and their gradients over the processes of a group: what nn.SyncBatchNorm adds to a batch norm.

Partial results travel as float64 and are merged in the order of the ranks, so every process computes the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

from resnet_fused.ops.running_stats import update_factor
from resnet_fused.params import StageParams
from resnet_fused.spec import StageSpec


def merge_statistics(stats: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """The statistics [2, C] (mean, biased variance) of all processes' batches, and the values per channel behind them.

    stats, count: this process's; batches may differ in size, and with a count of 0 the statistics may be anything.
    Chan, Golub & LeVeque 1979: (count, mean, M2) are merged pairwise. With fewer than two values per channel it raises
    ValueError in every process.
    """
    mine = torch.cat([stats.double().flatten(), stats.new_tensor([count], dtype=torch.float64)])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    counts = [int(n) for n in torch.stack(every)[:, -1].tolist()]  # one transfer from a GPU
    if sum(counts) < 2:
        raise ValueError(
            f"expected more than 1 value per channel when training, got {sum(counts)} over the {len(counts)} processes "
            "of the group; use a larger batch or picture, or eval()"
        )
    mean, m2 = torch.zeros_like(stats, dtype=torch.float64)
    seen = 0
    for other, n in zip(every, counts, strict=True):
        if n == 0:
            continue
        other_mean, other_var = other[:-1].view_as(stats)
        delta = other_mean - mean
        mean = mean + delta * (n / (seen + n))
        m2 = m2 + other_var * n + delta.square() * (seen * n / (seen + n))
        seen += n
    return torch.stack([mean, m2 / seen]).to(stats.dtype), seen


def add_up(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every process's `sums`, as a new tensor."""
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total


def of_pytorch(y: Tensor, stage: StageSpec, tensors: StageParams, group: dist.ProcessGroup) -> Tensor:
    """nn.SyncBatchNorm's own function, which updates the running statistics; raises ValueError on the CPU, as it."""
    if y.device.type == "cpu":
        raise ValueError(
            "PyTorch's SyncBatchNorm takes no CPU tensors in training; give backend='auto' or 'native', whose "
            "operators synchronise there"
        )
    weight, bias, mean, var = tensors.norm_weight, tensors.norm_bias, tensors.running_mean, tensors.running_var
    size = dist.get_world_size(group)
    return SyncBatchNorm.apply(y, weight, bias, mean, var, stage.eps, update_factor(tensors), group, size)
