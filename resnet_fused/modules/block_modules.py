"""From modules to what `functional.residual_block` takes: the tensors and the spec of a block's children.

A description holds until one of the modules changes (`module_state`), so replaced children, loaded weights, frozen
statistics and hooks are seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.module_state import GLOBAL_HOOKS, HOOKS
from resnet_fused.modules.operations import Operations
from resnet_fused.params import BlockParams, Scale, StageParams
from resnet_fused.spec import Activation, BlockSpec, IntPair, Memory, Order, Skip, StageSpec, batch_norm
from resnet_fused.spec.activations import KINDS, recognise


class FrozenNorm(NamedTuple):
    """What a class of batch norms whose four tensors are buffers computes.

    promotes: as `StageSpec.promotes`. eps: None where the module has it as an attribute.
    """

    promotes: bool
    eps: float | None = None


FROZEN_NORM = "torchvision.ops.misc.FrozenBatchNorm2d"  # timm freezes with the same class
NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"  # computes as nn.BatchNorm2d, then `drop` and `act`
FROZEN_NORM_ACT = "timm.layers.norm_act.FrozenBatchNormAct2d"
NORMS_WITH_ACT = (NORM_ACT, FROZEN_NORM_ACT)
FROZEN_NORMS = {
    FROZEN_NORM: FrozenNorm(promotes=True),
    FROZEN_NORM_ACT: FrozenNorm(promotes=True),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": FrozenNorm(promotes=False),  # F.batch_norm
}
OF_TRANSFORMERS = FrozenNorm(promotes=True, eps=1e-5)  # DETR's, of which each of its detectors has a copy


def frozen_norm(cls: type) -> FrozenNorm | None:
    """What this class computes, if it is a known one of constants."""
    path = class_path(cls)
    if path.startswith("transformers.models.") and path.endswith("FrozenBatchNorm2d"):
        return OF_TRANSFORMERS
    return FROZEN_NORMS.get(path)


@dataclass(frozen=True)
class StageModules:
    """The children behind one stage; in pre-activation order `norm` and `act` precede `conv`.

    act: a module (nn.ReLU, nn.PReLU), a function (``F.relu``, ``torch.relu``), an `Activation` or its name, or None for
    none. `spec.activations.KINDS` lists the known ones.
    """

    conv: nn.Module
    norm: nn.Module | None
    act: nn.Module | Callable[[Tensor], Tensor] | str | None


@dataclass(frozen=True)
class BlockModules:
    """The children behind one block: what an adapter returns. The other fields are those of `BlockSpec`/`BlockParams`.

    branch_scale, skip_scale: a float, or a tensor (a parameter, say), for scaled residuals such as ReZero.
    in_place_add:             forward adds by ``out += skip``, which keeps out's dtype.
    gate: what the branch is multiplied with before the addition, computed from its mean over pixels: [N, C] -> [N, C]
          or [N, 1], as `functional.residual_block` takes it.
    """

    stages: tuple[StageModules, ...]
    skip: Skip
    projection: StageModules | None = None
    order: Order = "post"
    branch_scale: Scale = 1.0
    skip_scale: Scale = 1.0
    in_place_add: bool = False
    gate: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class CompositeModules:
    """The children of a block that takes several fused calls: what an adapter returns where a part between convolutions
    has no fused form.

        x = before(x),   out = after(end(branch(x)) + skip(x))

    end:  the last fused call of the branch, with `skip` "none"; what the skip path gives is added before its last
          activation (in branch order behind it). None: `branch` is all, and there is no skip path.
    skip: () for x itself, None for no skip path.

    A step may itself be composite, as where three branches are added, or `Operations` that `structure` has traced.

    Modules among the steps are called, so their hooks run. Raises ValueError for parts that do not fit together.
    """

    branch: tuple[StepModules, ...] = ()
    end: BlockModules | None = None
    skip: tuple[StepModules, ...] | None = None
    before: tuple[StepModules, ...] = ()
    after: tuple[StepModules, ...] = ()

    def __post_init__(self) -> None:
        if self.end is None and self.skip is not None:
            raise ValueError("a skip path needs the fused call that it is added to: give end")
        if self.end is not None and self.end.skip != "none":
            raise ValueError(f"end has skip={self.end.skip!r}; accepted: 'none', the composite's own skip is added")

    @property
    def blocks(self) -> tuple[BlockModules, ...]:
        """The fused calls."""
        return tuple(step for step in self._steps() if isinstance(step, BlockModules))

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """The modules that are called as they are."""
        found: list[nn.Module] = []
        for step in self._steps():
            if isinstance(step, nn.Module):
                found.append(step)
            elif isinstance(step, Operations):
                found += step.modules
        return tuple(found)

    def _steps(self) -> Iterator[BlockModules | nn.Module | Operations]:
        end = () if self.end is None else (self.end,)
        for step in (*self.before, *self.branch, *end, *(self.skip or ()), *self.after):
            if isinstance(step, CompositeModules):
                yield from step._steps()
            else:
                yield step
                if isinstance(step, Operations):
                    yield from step.fused


Modules = BlockModules | CompositeModules
StepModules = Modules | nn.Module | Operations  # fused calls, or what is called as it is
Adapter = Callable[[nn.Module], Modules]


def called_by(modules: Modules) -> list[nn.Module]:
    """The modules that are called as they are."""
    return [] if isinstance(modules, BlockModules) else list(modules.called)


def stages_of(modules: Modules) -> list[StageModules]:
    """Every stage that is computed fused, projections included."""
    blocks = (modules,) if isinstance(modules, BlockModules) else modules.blocks
    return [stage for each in blocks for stage in (*each.stages, each.projection) if stage is not None]


def describe(modules: BlockModules, memory: Memory) -> tuple[BlockParams, BlockSpec]:
    """The tensors and the spec that compute what `modules` would compute, its gate apart, in their present state.

    Raises NotFusable, naming the part, where the fused block would compute something else: modules of other types,
    hooks (they would not run), asymmetric padding.
    """
    if any(GLOBAL_HOOKS):
        raise NotFusable("global module hooks are registered and would not run for the block's children")
    stages = [describe_stage(f"stages[{i}]", stage) for i, stage in enumerate(modules.stages)]
    projection = None if modules.projection is None else describe_stage("projection", modules.projection)
    params = BlockParams(
        tuple(tensors for tensors, _ in stages),
        None if projection is None else projection[0],
        modules.branch_scale,
        modules.skip_scale,
    )
    spec = BlockSpec(
        tuple(stage for _, stage in stages),
        modules.skip,
        None if projection is None else projection[1],
        modules.order,
        memory,
        modules.in_place_add,
    )
    return params, spec


def require_no_hooks(name: str, module: nn.Module) -> None:
    """Raises NotFusable if calling `module` runs more than its class's forward."""
    if any(getattr(module, kind) for kind in HOOKS):
        raise NotFusable(f"{name} ({type(module).__name__}) has hooks, which would not run")
    if "forward" in module.__dict__:
        raise NotFusable(f"{name} ({type(module).__name__}) has its forward replaced on the instance")


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm of any kind; `describe` says which are accepted."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or frozen_norm(type(module)) is not None


def original_path(module: nn.Module) -> str:
    """`class_path` of the module's class before `fuse`."""
    return class_path(getattr(type(module), "_fused_from", type(module)))


def class_path(cls: type) -> str:
    """The class's dotted name, by which classes of optional dependencies are recognised without importing them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe_stage(name: str, modules: StageModules) -> tuple[StageParams, StageSpec]:
    conv = _conv(f"{name}.conv", modules.conv)
    given_norm, given_act = _norm_and_act(name, modules)
    norm, batch_stats, eps = _norm(f"{name}.norm", given_norm)
    act = _activation(f"{name}.act", given_act)
    slope = given_act.weight if isinstance(given_act, nn.PReLU) else None
    params = StageParams(conv.weight, conv.bias, **norm, slope=slope)
    spec = StageSpec(
        conv.stride,  # type: ignore[arg-type]  # typed tuple[int, ...]
        _padding(f"{name}.conv", conv),
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        len(norm) > 0,  # Dynamo of torch 2.11 cannot take the truth of a dict
        batch_stats,
        eps,
        act,
        conv.padding_mode,
        promotes=(frozen := frozen_norm(type(given_norm))) is not None and frozen.promotes,
    )
    return params, spec


def _norm_and_act(name: str, modules: StageModules) -> tuple[nn.Module | None, Any]:
    """The stage's norm and activation; of timm's norms with an activation of their own the one that follows."""
    norm, act = modules.norm, modules.act
    if norm is None or class_path(type(norm)) not in NORMS_WITH_ACT:
        return norm, act
    if type(norm.drop) is not nn.Identity:
        raise NotFusable(f"{name}.norm drops with {type(norm.drop).__name__}; accepted: nn.Identity")
    require_no_hooks(f"{name}.norm.drop", norm.drop)
    own = None if type(norm.act) is nn.Identity else norm.act
    if own is None:
        require_no_hooks(f"{name}.norm.act", norm.act)  # type: ignore[arg-type]
        return norm, act
    if act is not None and type(act) is not nn.Identity:
        raise NotFusable(f"{name}.norm has an activation, {type(own).__name__}, and another follows it")
    return norm, own


def _conv(name: str, conv: nn.Module) -> nn.Conv2d:
    if type(conv) is not nn.Conv2d:  # a subclass may compute anything
        raise NotFusable(f"{name} is {type(conv).__name__}; accepted: nn.Conv2d itself")
    require_no_hooks(name, conv)
    return conv


def _padding(name: str, conv: nn.Conv2d) -> IntPair:
    padding = conv.padding
    if padding == "valid":
        return 0, 0
    if padding == "same":  # nn.Conv2d makes sure that the stride is 1
        height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        if height % 2 or width % 2:
            raise NotFusable(f"{name} has padding='same' with an even kernel, which pads one side more than the other")
        return height // 2, width // 2
    return padding  # type: ignore[return-value]


def _norm(name: str, norm: nn.Module | None) -> tuple[dict[str, Any], bool, float]:
    """(fields of StageParams, batch_stats, eps); no fields stands for no norm."""
    if norm is None:
        return {}, False, 0.0
    require_no_hooks(name, norm)
    if type(norm) is nn.Identity:
        return {}, False, 0.0
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or class_path(type(norm)) == NORM_ACT:
        return _batch_norm(norm)  # type: ignore[arg-type]
    frozen = frozen_norm(type(norm))
    if frozen is not None:
        eps = norm.eps if frozen.eps is None else frozen.eps
        fields = ("running_mean", "running_var")
        affine = {"norm_weight": norm.weight, "norm_bias": norm.bias}
        return affine | {field: getattr(norm, field) for field in fields}, False, float(eps)  # type: ignore[arg-type]
    raise NotFusable(
        f"{name} is {type(norm).__name__}; accepted: nn.BatchNorm2d and nn.SyncBatchNorm themselves, FrozenBatchNorm2d"
    )


def _batch_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> tuple[dict[str, Any], bool, float]:
    """As the module's forward decides from `training`, `track_running_stats` and the presence of buffers."""
    state = batch_norm.state(norm)
    fields: dict[str, Any] = {
        "norm_weight": state.weight,
        "norm_bias": state.bias,
        "running_mean": state.running_mean,
        "running_var": state.running_var,
        "num_batches_tracked": state.num_batches_tracked,
        "momentum": state.momentum,
        "processes": state.processes,
    }
    return fields, state.batch_stats, state.eps


def _activation(name: str, act: object) -> Activation:
    if isinstance(act, nn.Module):
        require_no_hooks(name, act)
    found = recognise(act)
    if found is not None and not (found.kind.learned and not isinstance(act, nn.Module)):
        return found
    given = type(act).__name__ if isinstance(act, nn.Module) else repr(act)
    modules = ", ".join(f"nn.{module.__name__}" for kind in KINDS.values() for module in kind.modules)
    raise NotFusable(f"{name} is {given}; accepted: {modules}, their functions and names, or None")
