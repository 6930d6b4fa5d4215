"""What a trace is matched to: a block's form with its children by name, so that it holds for every copy of the block.

`build` looks the names up and gives what an adapter gives; `words` says the form in a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    Modules,
    StageModules,
    StepModules,
)
from resnet_fused.modules.operations import Operation, Operations, look_up
from resnet_fused.params import Scale
from resnet_fused.spec import Activation, Order, Skip

SHOWN = 5  # operations by name in a line


@dataclass(frozen=True)
class Stage:
    """conv, norm: children; act: a child, or what a function computes."""

    conv: str
    norm: str | None = None
    act: Activation | str | None = None


@dataclass(frozen=True)
class Part:
    """Operations that are run as they are, from the value `entry` to the value `exit`; "fused" ones are `Fused`."""

    operations: tuple[Operation, ...]
    entry: int
    exit: int


@dataclass(frozen=True)
class Fused:
    """`BlockModules`. Scales: a number or a parameter's name; gate: from the branch to its factor."""

    stages: tuple[Stage, ...]
    skip: Skip = "none"
    projection: Stage | None = None
    order: Order = "post"
    branch_scale: float | str = 1.0
    skip_scale: float | str = 1.0
    in_place_add: bool = False
    gate: Part | None = None


@dataclass(frozen=True)
class Join:
    """`CompositeModules` with a branch that ends in a fused call, and a skip path; () is the input itself."""

    branch: Recipe
    end: Fused
    skip: Recipe


Step = Fused | Join | Part | str  # str: a child that is called as it is
Recipe = tuple[Step, ...]


def build(recipe: Recipe, block: nn.Module) -> Modules:
    """With the children of `block`. Raises AttributeError where it has lost one."""
    steps = tuple(_step(step, block) for step in recipe)
    if len(steps) == 1 and isinstance(steps[0], (BlockModules, CompositeModules)):
        return steps[0]
    return CompositeModules(steps)


def fused_calls(recipe: Recipe) -> Iterator[Fused]:
    for step in recipe:
        if isinstance(step, Fused):
            yield step
        elif isinstance(step, Join):
            yield from fused_calls((*step.branch, step.end, *step.skip))
        elif isinstance(step, Part):
            yield from (operation.target for operation in step.operations if operation.kind == "fused")


def _step(step: Step, block: nn.Module) -> StepModules:
    if isinstance(step, str):
        return look_up(block, step)
    if isinstance(step, Part):
        return Operations.of(block, step.operations, step.entry, step.exit, lambda fused: _fused(fused, block))
    if isinstance(step, Join):
        branch = tuple(_step(each, block) for each in step.branch)
        return CompositeModules(branch, _fused(step.end, block), tuple(_step(each, block) for each in step.skip))
    return _fused(step, block)


def _fused(step: Fused, block: nn.Module) -> BlockModules:
    return BlockModules(
        tuple(_stage(stage, block) for stage in step.stages),
        step.skip,
        None if step.projection is None else _stage(step.projection, block),
        step.order,
        _scale(step.branch_scale, block),
        _scale(step.skip_scale, block),
        step.in_place_add,
        None if step.gate is None else _gate(step.gate, block),
    )


def _stage(stage: Stage, block: nn.Module) -> StageModules:
    act: Any = stage.act
    if isinstance(act, str):  # a norm with an activation of its own brings it along
        act = None if act == f"{stage.norm}.act" else look_up(block, act)
    return StageModules(look_up(block, stage.conv), None if stage.norm is None else look_up(block, stage.norm), act)


def _scale(scale: float | str, block: nn.Module) -> Scale:
    return look_up(block, scale) if isinstance(scale, str) else scale


def _gate(part: Part, block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The factor reads its branch through the mean over pixels, and the mean of one pixel is that pixel."""
    operations = Operations.of(block, part.operations, part.entry, part.exit, lambda fused: _fused(fused, block))
    return lambda pooled: operations.run(pooled[:, :, None, None])


def words(recipe: Recipe, block: nn.Module) -> str:
    """As "conv3x3+bn+relu → conv3x3+bn, + x, relu"."""
    return " → ".join(_words(step, block) for step in recipe)


def _words(step: Step, block: nn.Module) -> str:
    if isinstance(step, str):
        return type(look_up(block, step)).__name__
    if isinstance(step, Part):
        shown = [each for each in step.operations if each.kind != "attribute"]
        plain = [each for each in shown if each.kind != "fused"]
        if len(plain) > SHOWN:
            chains = [_operation_words(each, block) for each in shown if each.kind == "fused"]
            return " beside ".join([f"{len(plain)} operations", *chains])
        return "+".join(_operation_words(each, block) for each in shown)
    if isinstance(step, Join):
        branch = [_words(each, block) for each in step.branch]
        return _joined_words(branch, step.end, words(step.skip, block) if step.skip else "x", block)
    skip = None if step.skip == "none" else "x"
    if step.projection is not None:
        skip = _stage_words(step.projection, block, step.order)
    return _joined_words([], step, skip, block)


def _joined_words(branch: list[str], end: Fused, skip: str | None, block: nn.Module) -> str:
    stages, after = list(end.stages), ""
    if end.order == "post" and skip is not None and (act := stages[-1].act) is not None:
        stages[-1] = Stage(stages[-1].conv, stages[-1].norm)
        after = f", {_act_words(act, block)}"
    text = " → ".join([*branch, *(_stage_words(stage, block, end.order) for stage in stages)])
    if end.gate is not None:
        text += ", * gate"
    if end.branch_scale != 1.0:
        text += f", * {_scale_words(end.branch_scale)}"
    if skip is not None:
        text += f", + {skip}"
    if end.skip_scale != 1.0:
        text += f" * {_scale_words(end.skip_scale)}"
    return text + after


def _stage_words(stage: Stage, block: nn.Module, order: Order) -> str:
    conv = look_up(block, stage.conv)
    height, width = conv.kernel_size
    parts = [f"conv{height}x{width}"]
    norm = [] if stage.norm is None else ["bn"]
    act = [] if stage.act is None else [_act_words(stage.act, block)]
    return "+".join([*norm, *act, *parts] if order == "pre" else [*parts, *norm, *act])


def _act_words(act: Activation | str, block: nn.Module) -> str:
    return type(look_up(block, act)).__name__.lower() if isinstance(act, str) else act.name


def _scale_words(scale: float | str) -> str:
    return scale if isinstance(scale, str) else f"{scale:g}"


def _operation_words(operation: Operation, block: nn.Module) -> str:
    if operation.kind == "module":
        return type(look_up(block, operation.target)).__name__
    if operation.kind == "fused":
        return f"({_words(operation.target, block)})"
    return operation.target if isinstance(operation.target, str) else operation.target.__name__
