"""From modules to what `functional.residual_block` takes: the tensors and the spec of a block's children.

A description holds until one of the modules changes (`module_state`), so replaced children, loaded weights, frozen
statistics and hooks are seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.module_state import GLOBAL_HOOKS, HOOKS
from resnet_fused.modules.operations import Operations
from resnet_fused.modules.overlay import is_gathered
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
# batch norms that compute as nn.BatchNorm2d and nn.SyncBatchNorm, of which they have another check of the input alone
BATCH_NORMS = (
    "mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm",
    "mmengine.model.utils._BatchNormXd",  # what revert_sync_batchnorm leaves
    "mmcv.utils.parrots_wrapper.SyncBatchNorm",
)
CONVS = ("mmcv.cnn.bricks.wrappers.Conv2d",)  # computes as nn.Conv2d
CONV_NORM_ACT = "detectron2.layers.wrappers.Conv2d"  # convolves, then `norm` and `activation`, where they are not None
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
          activation (in branch order behind it). None: `branch` is all, and PyTorch adds the skip path.
    skip: () for x itself, None for no skip path.
    in_place_add: without an end, the sum keeps the branch's dtype, as `BlockModules.in_place_add`.

    A step may itself be composite, as where three branches are added; a function of one tensor, for what the block's
    forward computes between its children; or `Operations` that `structure` has traced.

    Modules among the steps are called, so their hooks run. Raises ValueError for parts that do not fit together.
    """

    branch: tuple[StepModules, ...] = ()
    end: BlockModules | None = None
    skip: tuple[StepModules, ...] | None = None
    before: tuple[StepModules, ...] = ()
    after: tuple[StepModules, ...] = ()
    in_place_add: bool = False

    def __post_init__(self) -> None:
        if self.end is None and self.skip is not None and not self.branch:
            raise ValueError("a skip path needs a branch that it is added to: give branch, end or both")
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

    def _steps(self) -> Iterator[BlockModules | Operations | Callable[[Tensor], Tensor]]:
        end = () if self.end is None else (self.end,)
        return _flat((*self.before, *self.branch, *end, *(self.skip or ()), *self.after))


@dataclass(frozen=True)
class SplitModules:
    """A step whose input is split along the channels, a share for each path, and put together again behind them.

        x_1, …, x_n = split(x),   u_i = x_i + [1 < i <= cascade] out_{i-1},   out_i = path_i(u_i),   out = concat(out_i)

    cascade: how many paths, from the first on, are a cascade, each reading what the one before it gave (Res2Net).
    Raises ValueError for fewer than two paths, or a cascade of more than there are.
    """

    paths: tuple[tuple[StepModules, ...], ...]
    cascade: int = 0

    def __post_init__(self) -> None:
        if len(self.paths) < 2:
            raise ValueError(f"{len(self.paths)} paths; accepted: two or more")
        if not 0 <= self.cascade <= len(self.paths):
            raise ValueError(f"cascade={self.cascade}; accepted: 0 to {len(self.paths)}, the number of paths")


@dataclass(frozen=True)
class DenseModules:
    """A step of which each path reads everything before it: the input and what the other paths gave (DenseNet).

    out_0 = x,   out_i = path_i(concat(out_0, …, out_{i-1})),   out = concat(out_0, …, out_n)
    """

    paths: tuple[tuple[StepModules, ...], ...]


Modules = BlockModules | CompositeModules
# a fused call, steps of several, or what is called as it is: a module, or a function
StepModules = Modules | SplitModules | DenseModules | Operations | nn.Module | Callable[[Tensor], Tensor]
Adapter = Callable[[nn.Module], Modules]


def _flat(steps: Iterable[StepModules]) -> Iterator[BlockModules | Operations | Callable[[Tensor], Tensor]]:
    """The fused calls, and what is called as it is, at any depth."""
    for step in steps:
        if isinstance(step, CompositeModules):
            yield from step._steps()
        elif isinstance(step, (SplitModules, DenseModules)):
            yield from _flat(chain.from_iterable(step.paths))
        else:
            yield step
            if isinstance(step, Operations):
                yield from step.fused


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


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's forward."""
    try:
        require_no_hooks("", module)
    except NotFusable:
        return True
    return False


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm of any kind; `describe` says which are accepted."""
    known = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or class_path(type(module)) in BATCH_NORMS
    return known or frozen_norm(type(module)) is not None


def original_path(module: nn.Module) -> str:
    """`class_path` of the module's class before `fuse`."""
    return class_path(getattr(type(module), "_fused_from", type(module)))


def class_path(cls: type) -> str:
    """The class's dotted name, by which classes of optional dependencies are recognised without importing them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe_stage(name: str, modules: StageModules) -> tuple[StageParams, StageSpec]:
    conv = _conv(f"{name}.conv", modules.conv)
    given_norm, given_act = _norm_and_act(name, _unpacked(name, modules))
    norm, batch_stats, eps = _norm(f"{name}.norm", given_norm)
    act = _activation(f"{name}.act", given_act)
    slope = given_act.weight if isinstance(given_act, nn.PReLU) else None
    params = StageParams(conv.weight, conv.bias, **norm, slope=slope, gathered=is_gathered(conv))
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


def _unpacked(name: str, modules: StageModules) -> StageModules:
    """With the norm and the activation that its convolution holds itself."""
    conv = modules.conv
    if class_path(type(conv)) != CONV_NORM_ACT:
        return modules
    norm, act = conv.norm, conv.activation
    if conv.padding_mode != "zeros":
        raise NotFusable(f"{name}.conv pads with zeros though padding_mode is {conv.padding_mode!r}; accepted: 'zeros'")
    if modules.norm is not None and (norm is not None or act is not None):
        raise NotFusable(f"{name}.conv has a norm or an activation, and another norm follows it")
    if modules.act is not None and act is not None:
        raise NotFusable(f"{name}.conv has an activation, {_called(act)}, and another follows it")
    return StageModules(conv, modules.norm if norm is None else norm, modules.act if act is None else act)  # type: ignore[arg-type]


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
    if type(conv) is not nn.Conv2d and class_path(type(conv)) not in (*CONVS, CONV_NORM_ACT):  # it may compute anything
        raise NotFusable(f"{name} is {type(conv).__name__}; accepted: nn.Conv2d itself")
    require_no_hooks(name, conv)
    return conv  # type: ignore[return-value]


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
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or class_path(type(norm)) in (NORM_ACT, *BATCH_NORMS):
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
    known = (f"nn.{module.__name__}" for kind in KINDS.values() for module in kind.modules)
    modules = ", ".join(dict.fromkeys(known))
    raise NotFusable(f"{name} is {_called(act)}; accepted: {modules}, their functions and names, or None")


def _called(act: object) -> str:
    return type(act).__name__ if isinstance(act, nn.Module) else repr(act)
