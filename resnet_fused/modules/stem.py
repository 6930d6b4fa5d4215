"""Stems anywhere: convolution, norm, activation and pooling that a model's own forward calls one after the other.

There is no list of models. `runs` finds, in the source of a class's methods, children that are called in a row, and
makes each row one call of `FusedStem._fused_run`. That computes what is fusable of it and calls the rest as it is.
So a ResNet's stem is fused in torchvision's class, a subclass with a forward of its own, or a user's network that
holds a ResNet and calls its children; and features taken behind the activation stay what they are, since the row ends
there.

Chosen over fusing at the children (conv1 computes everything, bn1 and relu pass it on): ``model.conv1(x)`` called from
outside, or features taken behind it, would silently be another tensor. And over a mixin for each class that repeats
its lines: every subclass, extractor and library needs another. The original method stays in the original class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters, module_state
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    class_path,
    describe_stage,
    has_hooks,
    original_path,
    stages_of,
)
from resnet_fused.modules.fused_block import Description, FusedModule, original_class
from resnet_fused.modules.plan import Described, Plan, describe_all, pool_reason
from resnet_fused.modules.runs import FLATTEN, Run, merged
from resnet_fused.modules.together import FLATTENED, Together
from resnet_fused.ops.export import exports_plain


class KeptRun(NamedTuple):
    """What a run was at its last call: as `Description`, for these very parts."""

    parts: list[nn.Module]
    block: Described | Plan | None
    snapshot: module_state.Snapshot
    together: Together | None

    def holds(self, parts: list[nn.Module]) -> bool:
        same = len(parts) == len(self.parts) and all(a is b for a, b in zip(parts, self.parts, strict=True))
        return same and module_state.unchanged(self.snapshot)


class Kept(Description):
    """The runs' descriptions beside the module's own, which is not used."""

    __slots__ = ("runs",)

    def forget(self) -> None:
        super().forget()
        self.runs: dict[Run, KeptRun] = {}


class FusedStem(FusedModule):
    """A module whose methods call a run of children that is fused."""

    _fused_description: Kept
    _fused_keeps = Kept
    _fused_runs: ClassVar[tuple[Run, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_fused_from" in cls.__dict__:  # made of a mixin and an original
            methods, cls._fused_runs = merged(cls._fused_from)  # type: ignore[arg-type]
            for name, method in methods.items():
                setattr(cls, name, method)

    def fused_modules(self) -> Modules:
        return stem_modules(self)

    def _fused_parts(self) -> Iterable[nn.Module]:
        fused = [part for names in stem_runs(self) for part in _fused_of(_parts(self, names))]
        return [self, *(module for part in fused for module in part.modules())]

    def _fused_run(self, names: Run, x: Tensor) -> Tensor:
        """What calling these children in order computes."""
        parts = [_part(self, name) for name in names]
        described = self._fused_run_or_none(names, parts, x)
        kept = None if torch.compiler.is_compiling() else self._fused_description.runs.get(names)
        if kept is not None and kept.block is described and kept.together is not None:
            return kept.together.run(x)
        if described is not None:
            return described.run(x, self._fused_settings.backend)
        for part in parts:
            x = part(x)
        return x

    def _fused_run_or_none(self, names: Run, parts: list[nn.Module], x: Tensor) -> Described | Plan | None:
        """As `_fused_or_none`, of a run."""
        if not isinstance(x, Tensor) or exports_plain():
            return None
        if not all(isinstance(part, nn.Module) for part in parts):  # a function, say
            return None

        def describe() -> Described | Plan | None:
            return describe_all(_steps(parts), self._fused_settings.memory) if _is_stem(parts, lone=True) else None

        if torch.compiler.is_compiling():
            return self._fused_describe_or_log(describe)
        last = self._fused_description.runs.get(names)
        if last is not None and last.holds(parts):
            return last.block
        block = self._fused_describe_or_log(describe)
        if block is not None and last is not None:
            block = block.remember(last.block)
        steps = block.sequence if isinstance(block, Plan) else tuple(parts) if block is None else None
        together = None if steps is None else Together.of(steps, self._fused_settings.backend)
        self._fused_description.runs[names] = KeptRun(parts, block, module_state.snapshot(_read(parts)), together)
        return block

    def _fused_items(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """The items of an nn.ModuleDict that returns some of their results, each group of `_groups` as one."""
        items: list[tuple[str, Callable[[Tensor], Tensor]]] = list(self._modules.items())  # type: ignore[arg-type]
        for group in _groups(self):
            at = [name for name, _ in items].index(group[0])
            items[at : at + len(group)] = [(group[-1], partial(self._fused_run, group))]
        return items


class FusedOwnResNet(FusedStem):
    """This package's ResNet in pre-activation order ends in a norm and a ReLU: one pass."""

    def _fused_run(self, names: Run, x: Tensor) -> Tensor:
        if names != ("norm", "relu") or not isinstance(x, Tensor) or exports_plain():
            return super()._fused_run(names, x)
        norm, act = (_part(self, name) for name in names)
        if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or type(act) is not nn.ReLU or has_hooks(act):
            return super()._fused_run(names, x)
        # a backend asked for by name may have no batch norm on its own
        backend = "eager" if self._fused_settings.backend == "eager" else "auto"
        return functional.batch_norm_act(x, norm, backend=backend)


def mixin(cls: type[nn.Module]) -> type[FusedStem]:
    """For the owner of a stem."""
    return FusedOwnResNet if class_path(cls) == "resnet_fused.models.resnet.ResNet" else FusedStem


def stem_runs(module: nn.Module) -> list[Run]:
    """The rows of calls in the module's methods that are fused as one, hooks and the like apart."""
    methods, runs = merged(original_class(module))  # type: ignore[arg-type]
    if not methods:
        return []
    lone = _holds_blocks(module)
    return [names for names in (*runs, *_groups(module)) if _is_stem(_parts(module, names), lone)]


def stem_modules(module: nn.Module) -> Modules:
    """What is fused of its runs. Raises NotFusable."""
    reason = NotFusable("its methods call no convolution and batch norm in a row")
    found: dict[tuple[int, ...], BlockModules] = {}  # once, where several methods call the same
    for names in stem_runs(module):
        try:
            blocks = _steps(_parts(module, names)).blocks
        except NotFusable as refusal:
            reason = refusal
            continue
        found |= {tuple(id(stage.conv) for stage in block.stages): block for block in blocks}
    if not found:
        raise reason
    each = tuple(found.values())
    return each[0] if len(each) == 1 else CompositeModules(each)


def refused_stem(module: nn.Module) -> str | None:
    """Why a network of known blocks has no fused stem, where it calls a convolution and two more layers in a row."""
    methods, runs = merged(original_class(module))  # type: ignore[arg-type]
    if not methods or not _holds_blocks(module):
        return None
    for names in runs:
        layers = sequential.opened(_parts(module, names))[:3]
        single = not any(any(True for _ in part.children()) for part in layers)
        if len(layers) == 3 and single and isinstance(layers[0], nn.Conv2d):
            try:
                describe_stage("stages[0]", StageModules(*layers))
            except NotFusable as reason:
                return str(reason)
    return None


def pool_note(module: nn.Module) -> str | None:
    """Why the pooling that a stem's owner calls behind it is not part of the fused call, or None."""
    for names in stem_runs(module):
        parts = _parts(module, names)
        fused = {id(part) for part in _fused_of(parts)}
        for name, part in zip(names, parts, strict=True):
            if "pool" in name and id(part) not in fused:
                reason = pool_reason(part)
                return None if reason is None else f"{name} is {reason}"
            if id(part) not in fused:
                break
    return None


def joint_note(module: FusedStem) -> str | None:
    """What the last evaluation took together with its stem, or None."""
    runs = module._fused_description.runs.values()
    notes = (run.together.note() for run in runs if run.together is not None)
    return next((note for note in notes if note is not None), None)


def _groups(module: nn.Module) -> list[Run]:
    """Of an nn.ModuleDict that returns some of its items' results: names of single layers in a row. Networks among the
    items stay by themselves, so that gradient checkpointing, which takes one item at a time, is what it was."""
    returned = getattr(module, "return_layers", None)
    if not isinstance(module, nn.ModuleDict) or not isinstance(returned, dict):
        return []
    groups: list[list[str]] = [[]]
    for name, item in module._modules.items():
        if item is None or sequential.is_network(item):
            groups.append([])
            continue
        groups[-1].append(name)
        if name in returned:
            groups.append([])
    return [tuple(group) for group in groups if len(group) > 1]


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a network of known blocks: elsewhere a single layer may be anything, such as attention's."""
    for part in module.modules():
        cls = original_class(part)
        if adapters.find(cls) is not None and class_path(cls) not in adapters.LAYERS:
            return True
    return False


def _part(module: nn.Module, name: str) -> nn.Module:
    return FLATTENED if name == FLATTEN else reduce(getattr, name.split("."), module)


def _parts(module: nn.Module, names: Run) -> list[nn.Module]:
    """Its modules by these names; none where one of them is missing or no module."""
    try:
        parts = [_part(module, name) for name in names]
    except AttributeError:
        return []
    return parts if all(isinstance(part, nn.Module) for part in parts) else []


def _is_stem(parts: list[nn.Module], lone: bool) -> bool:
    """Whether a fused call reaches over several of them. A known layer or an nn.Sequential alone is fused by itself.

    lone: whether a single convolution, norm and activation are enough, without another or a pooling behind them.
    """
    steps = sequential.chains(parts, _layer)
    held = [{id(module) for module in part.modules()} for part in parts]
    for step, following in zip(steps, (*steps[1:], None), strict=False):
        if isinstance(step, BlockModules):
            fused = {id(part) for stage in step.stages for part in (stage.conv, stage.norm, stage.act)}
            if isinstance(following, nn.Module) and pool_reason(following) is None:
                fused.add(id(following))
            if not lone and len(step.stages) == 1 and id(following) not in fused:
                continue
            if sum(not fused.isdisjoint(modules) for modules in held) > 1:
                return True
    return False


def _steps(parts: list[nn.Module]) -> CompositeModules:
    """The run as fused calls, and what is called between and behind them. Raises NotFusable where nothing is fused."""
    return sequential.composite(sequential.chains(parts, _layer))


def _layer(module: nn.Module) -> BlockModules | None:
    """A known layer on its own, such as timm's ConvNormAct, which is a stage of a run."""
    if original_path(module) not in adapters.LAYERS:
        return None
    adapter = adapters.find(original_class(module))
    try:
        found = None if adapter is None or has_hooks(module) else adapter(module)
    except NotFusable:
        return None
    return found if isinstance(found, BlockModules) else None


def _fused_of(parts: list[nn.Module]) -> list[nn.Module]:
    """Those that are computed by the fused calls of the run."""
    try:
        stages = stages_of(_steps(parts))
    except NotFusable:
        return []
    fused = {id(part) for stage in stages for part in (stage.conv, stage.norm, stage.act)}
    return [part for part in parts if any(id(module) in fused for module in part.modules())]


def _read(parts: list[nn.Module]) -> list[nn.Module]:
    """The modules on which a run's description depends, and not what it calls: that is right whatever it becomes."""
    called = {id(step) for step in sequential.chains(parts, _layer)}
    return [module for part in parts if id(part) not in called for module in part.modules()]
