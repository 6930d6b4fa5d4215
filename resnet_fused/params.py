"""The tensors of a block; the counterpart of `spec`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from resnet_fused.spec.batch_norm import Processes

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
    slope:                [1] or [C], of an activation that learns it (PReLU); in post-activation order the last stage's
                          has C_out channels
    processes:            those with which a stage with `batch_stats` shares its batch, as in nn.SyncBatchNorm
    gathered:             the tensors are written anew before each call, as fully_shard does, and no version counter
                          shows it
    """

    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    slope: Tensor | None = None
    processes: Processes | None = None
    gathered: bool = False

    @property
    def convolution(self) -> StageParams:
        """Without norm and activation."""
        return StageParams(self.weight, self.bias, gathered=self.gathered)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether it is made of other tensors, as a DTensor is: it has no values of its own that kernels could read."""
    return type(tensor) is not Tensor and hasattr(type(tensor), "__tensor_flatten__")


class Kept:
    """What earlier calls found out about the tensors of a `BlockParams`. It ends with them; copies begin without it.

    checked: the results of `validation.check`, with the inputs for which they hold. folded: likewise the results of
    `backends.folding` or `prepared`. engine: `prepared.reason_against`, by dtype. gated: parts of `ops.gated_block`.
    pieces: those of `ops.split_block`.
    """

    __slots__ = ("checked", "engine", "folded", "gated", "pieces")

    def __init__(self) -> None:
        self.checked: Any = None
        self.folded: Any = None
        self.engine: dict[Any, Any] = {}
        self.gated: Any = None
        self.pieces: Any = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


@dataclass(frozen=True)
class BlockParams:
    """Tensors of a block: one `StageParams` per stage, the projection's, and the two scales.

    branch_scale, skip_scale: a float, or a tensor (0-d, one element, or one per output channel, any shape that
    squeezes to [C_out]) which receives gradients.
    """

    stages: tuple[StageParams, ...]
    projection: StageParams | None = None
    branch_scale: Scale = 1.0
    skip_scale: Scale = 1.0

    @property
    def kept(self) -> Kept:
        """What is kept with these tensors for later calls."""
        return self.__dict__.get("_kept") or self.__dict__.setdefault("_kept", Kept())

    @property
    def convs(self) -> tuple[StageParams, ...]:
        """The chain's stages, then the projection: the order of `BlockSpec.convs`."""
        return (*self.stages, self.projection) if self.projection is not None else self.stages

    @property
    def gathered(self) -> bool:
        """Whether a stage's tensors are written anew before each call."""
        return any(p.gathered for p in self.convs)

    @property
    def shares_batch(self) -> bool:
        """Whether a norm takes its statistics over other processes' batches, too, at this moment."""
        if "_processes" not in self.__dict__:
            self.__dict__["_processes"] = tuple(p.processes for p in self.convs if p.processes is not None)
        return any(processes.group is not None for processes in self.__dict__["_processes"])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that the block reads, without the counters."""
        if "_tensors" not in self.__dict__:
            found: list[Scale | None] = [self.branch_scale, self.skip_scale]
            for p in self.convs:
                found += [p.weight, p.bias, p.norm_weight, p.norm_bias, p.running_mean, p.running_var, p.slope]
            self.__dict__["_tensors"] = tuple(t for t in found if isinstance(t, Tensor))
        return self.__dict__["_tensors"]


def same(a: BlockParams, b: BlockParams) -> bool:
    """Whether both hold the same tensor objects and equal numbers."""

    def values(params: BlockParams) -> list[Any]:
        stages = [getattr(stage, f.name) for stage in params.convs for f in fields(StageParams)]
        return [params.branch_scale, params.skip_scale, *stages]

    pairs = list(zip(values(a), values(b), strict=False))
    shape = len(a.stages), a.projection is None
    return shape == (len(b.stages), b.projection is None) and all(
        p is q or (not (isinstance(p, Tensor) or isinstance(q, Tensor)) and p == q) for p, q in pairs
    )


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
