"""What inverted residuals have in common: stages, attention or other modules, stages, and a bare addition."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resnet_fused.modules.block_modules import (
    NORMS_WITH_ACT,
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
    class_path,
)
from resnet_fused.params import Scale


def inverted_residual(
    before: tuple[StageModules, ...],
    last: tuple[StageModules, ...],
    *,
    adds: bool,
    attention: Callable[[Tensor], Tensor] | None = None,
    between: tuple[nn.Module, ...] = (),
    gate: Callable[[Tensor], Tensor] | None = None,
    branch_scale: Scale = 1.0,
    in_place_add: bool = False,
) -> Modules:
    """The block of `before`, then attention or modules that are called as they are, then `last`.

    adds: whether x is added behind the last stage; `gate` is the branch's.
    """
    branch: tuple[StepModules, ...] = ()
    if between:
        branch = (*((BlockModules(before, "none"),) if before else ()), *between)
    elif attention is not None:
        branch = (BlockModules(before, "none", order="branch", gate=attention),)
    end = BlockModules(
        last if branch else (*before, *last),
        "identity" if adds and not branch else "none",
        order="branch" if _activates(last[-1]) else "post",
        branch_scale=branch_scale,
        in_place_add=in_place_add,
        gate=gate,
    )
    return CompositeModules(branch, end, () if adds else None) if branch else end


def _activates(stage: StageModules) -> bool:
    norm = stage.norm
    own = norm.act if norm is not None and class_path(type(norm)) in NORMS_WITH_ACT else None
    return any(act is not None and type(act) is not nn.Identity for act in (stage.act, own))
