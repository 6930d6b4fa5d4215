"""What a batch norm module computes with, in its present state."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """Processes whose batches are one batch; None: all of torch.distributed's."""

    given: dist.ProcessGroup | None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group to synchronise with at this moment: None without torch.distributed, and alone in the group."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.given or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


@dataclass(frozen=True)
class BatchNorm:
    """The tensors and settings of one call, as the module's own forward decides them.

    weight, bias:              [C], None without affine
    running_mean, running_var: [C]; read when `batch_stats` is off, updated in place when it is on; None: neither
    num_batches_tracked:       0-d int64, incremented in training; None: not counted
    momentum:                  of the running statistics; None for the cumulative average
    batch_stats:               normalise with the batch's statistics, otherwise with the running ones
    processes:                 those whose batches are one batch, None for this process alone
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    batch_stats: bool
    channels: int
    processes: Processes | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.processes is None else self.processes.group


def read(module: nn.Module) -> BatchNorm:
    """The module's state, from `training`, `track_running_stats`, its tensors and the presence of its buffers.

    Raises TypeError for anything but nn.BatchNorm2d and nn.SyncBatchNorm themselves: a subclass may compute anything.
    """
    if type(module) is not nn.BatchNorm2d and type(module) is not nn.SyncBatchNorm:
        raise TypeError(
            f"bn is {type(module).__module__}.{type(module).__qualname__}; accepted: nn.BatchNorm2d and "
            "nn.SyncBatchNorm themselves, since a subclass may compute something else"
        )
    return state(module)


def state(module: nn.BatchNorm2d | nn.SyncBatchNorm) -> BatchNorm:
    """`read`, of a module that is known to decide as these two do, such as some libraries' subclasses."""
    mean, var = module.running_mean, module.running_var
    tracked = module.training and module.track_running_stats
    used = not module.training or tracked
    return BatchNorm(
        module.weight,
        module.bias,
        mean if used else None,
        var if used else None,
        module.num_batches_tracked if tracked else None,
        module.momentum,
        module.eps,
        module.training or (mean is None and var is None),
        module.num_features,
        Processes(module.process_group) if isinstance(module, nn.SyncBatchNorm) and module.training else None,
    )
