"""The tensors a block is computed with; the counterpart of `spec`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor

Scale = float | Tensor


@dataclass(frozen=True)
class StageParams:
    """Tensors of one stage, C_in -> C_out channels; `C` is the normalised width.

    C is C_out in post-activation order and C_in in pre-activation order.

    weight:               [C_out, C_in / groups, R, S]
    bias:                 [C_out], optional
    norm_weight/norm_bias: [C] gamma and beta, None without affine
    running_mean/running_var: [C]; read when the stage's `batch_stats` is off, updated in place when it is on;
                          None without tracking
    num_batches_tracked:  0-d int64, incremented in training; optional
    momentum:             of the running statistics; None for the cumulative average
    """

    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1


@dataclass(frozen=True)
class BlockParams:
    """Tensors of a block: one `StageParams` a stage, the projection's, and the two scales.

    branch_scale, skip_scale: a float, or a tensor (0-d, one element, or one per output channel, any shape that
    squeezes to [C_out]) which receives gradients.
    """

    stages: tuple[StageParams, ...]
    projection: StageParams | None = None
    branch_scale: Scale = 1.0
    skip_scale: Scale = 1.0

    @property
    def convs(self) -> tuple[StageParams, ...]:
        """The chain's stages, then the projection: the order of `BlockSpec.convs`."""
        return (*self.stages, self.projection) if self.projection is not None else self.stages


def map_tensors(params: BlockParams, change: Callable[[str, Tensor], Tensor]) -> BlockParams:
    """params with each tensor replaced by ``change(name, tensor)``; names as "stages.0.weight"."""

    def stage(name: str, tensors: StageParams) -> StageParams:
        present = [(f.name, getattr(tensors, f.name)) for f in fields(tensors)]
        return replace(tensors, **{n: change(f"{name}.{n}", t) for n, t in present if isinstance(t, Tensor)})  # type: ignore[arg-type]

    def scale(name: str, value: Scale) -> Scale:
        return change(name, value) if isinstance(value, Tensor) else value

    return BlockParams(
        tuple(stage(f"stages.{i}", s) for i, s in enumerate(params.stages)),
        None if params.projection is None else stage("projection", params.projection),
        scale("branch_scale", params.branch_scale),
        scale("skip_scale", params.skip_scale),
    )
