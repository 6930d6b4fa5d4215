"""From the operations of a trace to fused calls: convolution, norm and activation in a row, sums and gates.

Between x and the output there are values through which everything passes. What lies between two of them is one
operation, or paths that meet again in an addition or a product; each path is taken apart in the same way.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import (
    NORMS_WITH_ACT,
    StageModules,
    class_path,
    describe_stage,
    frozen_norm,
)
from resnet_fused.modules.operations import Operation, Value, look_up
from resnet_fused.modules.structure.recipe import Fused, Join, Part, Recipe, Stage, Step, fused_calls
from resnet_fused.modules.structure.trace import Traced, bound, function_name, has_hooks, writes
from resnet_fused.spec import Activation, Order
from resnet_fused.spec.activations import IDENTITY, activation, recognise

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
IN_PLACE = (operator.iadd, "add_")
SHAPE_ALONE = ("size", "dim")  # what reads no value
METHODS = {"relu": "relu", "relu_": "relu"}  # activations that tensors have
CHAIN = ("conv", "norm", "act")

Kind = Literal["conv", "norm", "act", "scale", "gate", "sum", "other"]


@dataclass(frozen=True)
class Item:
    """A piece of a path, from the value `entry` to the value `exit`.

    what:   conv, norm: the child; act: the child, or what a function computes; scale: a number, or a parameter; gate:
            the factor.
    terms:  of a sum.
    in_place: a sum is written to its first term.
    """

    kind: Kind
    operations: tuple[Operation, ...]
    entry: int
    exit: int
    what: Any = None
    terms: tuple[Path, ...] = ()
    in_place: bool = False


Path = tuple[Item, ...]


def match(block: nn.Module, traced: Traced) -> Recipe:
    """The fused calls in a block's trace, and what is called between. Raises NotFusable where there is none."""
    graph = _Graph(block, traced)
    recipe = graph.steps(graph.path(0, traced.output))
    if not any(fused_calls(recipe)):
        raise NotFusable("it has no convolution with a batch norm beside it, each called once, that nothing else reads")
    return recipe


class _Graph:
    """A trace with what follows from it."""

    def __init__(self, block: nn.Module, traced: Traced) -> None:
        self._block = block
        self._operations = {operation.number: operation for operation in traced.operations}
        self._varies = {0}  # values that depend on x
        for operation in traced.operations:
            if operation.reads & self._varies:
                self._varies.add(operation.number)
        self._written = {o.args[0].number for o in traced.operations if writes(block, o)}
        called = [look_up(block, str(o.target)) for o in traced.operations if o.kind == "module"]
        self._repeated = {id(module) for module in called if sum(module is each for each in called) > 1}

    def path(self, entry: int, leave: int) -> Path:
        """From one value to another that depends on x through it alone."""
        between = self._between(entry, leave)
        order = [entry, *between]
        place = {index: i for i, index in enumerate(order)}
        passed_over: set[int] = set()
        for index in between:
            for read in self._operations[index].reads & place.keys():
                passed_over |= set(range(place[read] + 1, place[index]))
        cuts = [i for i in range(len(order)) if i not in passed_over]
        items: list[Item] = []
        for start, end in itertools.pairwise(cuts):
            inner = order[start + 1 : end]
            items += self._region(order[start], inner, order[end]) if inner else self._single(order[start], order[end])
        return tuple(items)

    def _between(self, entry: int, leave: int) -> list[int]:
        """What `leave` needs of what depends on `entry`, in order, with `leave`."""
        if entry == leave:
            return []
        needed = {leave}
        for index in range(leave, entry, -1):
            if index in needed and index in self._operations:
                needed |= self._operations[index].reads & self._varies
        return sorted(index for index in needed if index > entry)

    def _with_constants(self, indices: Iterable[int]) -> tuple[Operation, ...]:
        """The operations, and those on parameters alone that they read."""
        needed = set(indices)
        waiting = list(needed)
        while waiting:
            new = {i for i in self._operations[waiting.pop()].reads if i not in self._varies} - needed
            needed |= new
            waiting += new
        return tuple(self._operations[index] for index in sorted(needed))

    def _single(self, entry: int, leave: int) -> list[Item]:
        operation = self._operations[leave]
        item = Item("other", self._with_constants([leave]), entry, leave)
        if operation.kind == "module":
            if operation.args != (Value(entry),) or operation.kwargs:
                return [item]
            return self._module(item, str(operation.target))
        act = _activation(operation)
        if act is not None:
            return [replace(item, kind="act", what=act)]
        scale = self._scale(operation)
        return [item] if scale is None else [replace(item, kind="scale", what=scale)]

    def _module(self, item: Item, name: str) -> list[Item]:
        module = look_up(self._block, name)
        if has_hooks(module) or "forward" in module.__dict__:
            return [item]
        once = id(module) not in self._repeated
        if type(module) is nn.Conv2d and once and _is_describable(module):
            return [replace(item, kind="conv", what=name)]
        if class_path(type(module)) in NORMS_WITH_ACT and once:
            if type(module.drop) is not nn.Identity or has_hooks(module.drop) or has_hooks(module.act):
                return [item]
            norm = replace(item, kind="norm", what=name)
            if type(module.act) is nn.Identity:
                return [norm]
            own = Item("act", (), item.exit, item.exit, f"{name}.act")
            return [item] if recognise(module.act) is None else [norm, own]
        if (type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or frozen_norm(type(module)) is not None) and once:
            return [replace(item, kind="norm", what=name)]
        act = recognise(module)
        return [item] if act in (None, IDENTITY) else [replace(item, kind="act", what=name)]

    def _scale(self, operation: Operation) -> float | str | None:
        """The constant, or the parameter, that x is multiplied with; None for another operation."""
        if operation.kwargs or len(operation.args) != 2:
            return None
        if operation.target in (operator.truediv, torch.div, "div") and _is_number(operation.args[1]):
            return None if operation.args[1] == 0 else 1 / operation.args[1]
        if operation.target not in PRODUCTS:
            return None
        for factor in operation.args:
            if _is_number(factor):
                return float(factor)
            made = self._operations.get(factor.number) if isinstance(factor, Value) else None
            if made is not None and made.kind == "attribute":
                tensor = look_up(self._block, str(made.target))
                per_channel = tensor.dim() >= 3 and tensor.shape[-2:] == (1, 1) and tensor.shape[:-3].numel() == 1
                if tensor.is_floating_point() and (tensor.numel() == 1 or per_channel):
                    return str(made.target)
        return None

    def _region(self, entry: int, inner: list[int], leave: int) -> list[Item]:
        """Paths that meet in `leave`."""
        operation = self._operations[leave]
        item = Item("other", self._with_constants([*inner, leave]), entry, leave)
        values = [arg.number for arg in operation.args if isinstance(arg, Value) and arg.number in self._varies]
        if len(values) != 2 or len(operation.args) != 2 or values[0] == values[1]:
            return [item]
        if operation.target in PRODUCTS and not operation.kwargs and entry in values:
            factor = values[1 - values.index(entry)]
            gate = Part(self._with_constants(self._between(entry, factor)), entry, factor)
            return [replace(item, kind="gate", what=gate) if self._pools(gate) else item]
        if operation.target not in ADDITIONS or set(operation.kwargs) - {"alpha"}:
            return [item]
        paths = [self._between(entry, value) for value in values]
        alpha = operation.kwargs.get("alpha", 1)
        if set(paths[0]) & set(paths[1]) or not _is_number(alpha):
            return [item]
        first, second = (self.path(entry, value) for value in values)
        if alpha != 1:
            second = (*second, Item("scale", (), values[1], values[1], float(alpha)))
        return [replace(item, kind="sum", terms=(first, second), in_place=operation.target in IN_PLACE)]

    def _pools(self, gate: Part) -> bool:
        """Whether the factor reads its branch through the mean over all pixels alone, and its shape."""
        return all(
            self._is_mean(operation, gate.entry) or _reads_shape(operation, gate.entry)
            for operation in gate.operations
            if gate.entry in operation.reads
        )

    def _is_mean(self, operation: Operation, entry: int) -> bool:
        if not operation.args or operation.args[0] != Value(entry):
            return False
        if operation.kind == "module":
            module = look_up(self._block, str(operation.target))
            return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
        if operation.target is F.adaptive_avg_pool2d:
            return bound(operation).get("output_size") in (1, (1, 1), [1, 1])
        if operation.target in ("mean", torch.mean):
            dims = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else None)
            return isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]
        return False

    def steps(self, path: Path, summed: bool = False) -> Recipe:
        """Fused calls, and what lies between. summed: a sum that may be fused is written to what the path gives."""
        absorbed = path[-1].exit if path and summed else None
        steps: list[Step] = []
        loose: list[Item] = []
        i = 0
        while i < len(path):
            found = self._chain(path, i, absorbed) or _shared_norm(path, i) or self._joined(path, i)
            if found is None:
                loose.append(path[i])
                i += 1
            else:
                steps += [*self._called(loose), found[0]]
                loose.clear()
                i += found[1]
        return (*steps, *self._called(loose))

    def _called(self, items: list[Item]) -> list[Step]:
        """Items that are not fused whole: children that are called, and operations, with the chains among them."""
        steps: list[Step] = []
        rest: list[Item] = []

        def end_part() -> None:
            if rest:
                operations = {operation.number: operation for item in rest for operation in item.operations}
                chained = self._with_chains([operations[number] for number in sorted(operations)], rest[-1].exit)
                steps.append(Part(chained, rest[0].entry, rest[-1].exit))
                rest.clear()

        for item in items:
            only = item.operations[0] if len(item.operations) == 1 else None
            if only is not None and only.kind == "module" and only.args == (Value(item.entry),) and not only.kwargs:
                end_part()
                steps.append(only.target)
            elif item.operations:
                rest.append(item)
        end_part()
        return steps

    def _with_chains(self, operations: list[Operation], leave: int) -> tuple[Operation, ...]:
        """With each row of convolution, norm and activation that nothing else reads as one operation."""
        readers: dict[int, list[Operation]] = {}
        for operation in operations:
            for number in operation.reads:
                readers.setdefault(number, []).append(operation)
        taken: set[int] = set()
        found: list[Operation] = []
        for operation in operations:
            if operation.number in taken:
                continue
            row = self._row(operation, readers, leave)
            chain = self._chain(tuple(row), 0) if row else None
            if chain is None:
                found.append(operation)
                continue
            used = row[: chain[1]]
            taken |= {each.number for item in used for each in item.operations}
            found.append(Operation(used[-1].exit, "fused", chain[0], (Value(used[0].entry),)))
        return tuple(sorted(found, key=lambda each: each.number))

    def _row(self, operation: Operation, readers: dict[int, list[Operation]], leave: int) -> list[Item]:
        """The convolutions, norms and activations from here on, each of which alone reads the one before."""
        row: list[Item] = []
        following: Operation | None = operation
        while following is not None and following.reads:
            entry = min(following.reads)
            items = self._single(entry, following.number)
            if len(following.reads) != 1 or any(item.kind not in CHAIN for item in items):
                break
            row += items
            reading = readers.get(following.number, [])
            following = reading[0] if len(reading) == 1 and row[-1].exit != leave else None
        return row

    def _chain(self, path: Path, start: int, absorbed: int | None = None) -> tuple[Fused, int] | None:
        """The chain that begins here, with the gate behind it, and how many items it is.

        absorbed: a value that nothing writes to but what is fused as well.
        """
        order: Order = "post"
        if path[start].kind == "norm":
            stages, length = _pre_stages(path, start)
            order = "pre"
            if start + length < len(path) and path[start + length].kind in CHAIN:
                return None  # its last norm stands behind a convolution
        else:
            stages, length = _post_stages(path, start)
        if not any(stage.norm for stage in stages):
            return None
        end = start + length
        if order == "post" and stages[-1].act is not None and path[end - 1].exit in self._written - {absorbed}:
            # backward may need the result that is written to
            stages = (*stages[:-1], replace(stages[-1], act=None))
            return (Fused(stages, order=order), length - 1)
        if end < len(path) and path[end].kind == "gate":
            order = "branch" if order == "post" and stages[-1].act is not None else order
            return Fused(stages, order=order, gate=path[end].what), length + 1
        return Fused(stages, order=order), length

    def _joined(self, path: Path, at: int) -> tuple[Step, int] | None:
        """The sum that stands here, with the activation behind it where the fused call takes it."""
        if path[at].kind != "sum":
            return None
        after = path[at + 1] if at + 1 < len(path) and path[at + 1].kind == "act" else None
        if after is not None and after.exit in self._written:
            after = None
        found = self._join(_flat(path[at]), path[at].in_place, after)
        return None if found is None else (found[0], 2 if found[1] else 1)

    def _join(self, terms: list[Path], in_place: bool, after: Item | None) -> tuple[Step, bool] | None:
        """(the fused call that adds, whether it takes the activation) or None where no term ends in a fused call."""
        ends: list[tuple[int, int, Recipe, float | str]] = []
        for i, term in enumerate(terms):
            path, scale = _unscaled(term)
            recipe = self.steps(path, summed=in_place and i == 0)
            if recipe and isinstance(recipe[-1], Fused) and recipe[-1].skip == "none":
                count = sum(len(step.stages) for step in recipe if isinstance(step, Fused))
                ends.append((count, -i, recipe, scale))
        if not ends:
            return None
        _, place, recipe, scale = max(ends, key=lambda each: each[:2])
        rest = [term for i, term in enumerate(terms) if i != -place]
        end = replace(recipe[-1], branch_scale=scale, in_place_add=in_place and place == 0)  # type: ignore[type-var]
        assert isinstance(end, Fused)
        takes = False
        if end.order == "post" and end.stages[-1].act is not None:
            end = replace(end, order="branch")
        elif end.order == "post" and after is not None:
            end = replace(end, stages=(*end.stages[:-1], replace(end.stages[-1], act=after.what)))
            takes = True
        if len(rest) > 1:
            inner = self._join(rest, False, None)
            return None if inner is None else (Join(recipe[:-1], end, (inner[0],)), takes)
        skip, skip_scale = _unscaled(rest[0])
        end = replace(end, skip_scale=skip_scale)
        kinds = [item.kind for item in skip]
        if len(recipe) == 1:
            if not skip:
                return replace(end, skip="identity"), takes
            if kinds in (["conv"], ["conv", "norm"]) and end.order != "pre":
                projection = Stage(skip[0].what, skip[1].what if len(skip) > 1 else None)
                return replace(end, skip="projection", projection=projection), takes
        return Join(recipe[:-1], end, self.steps(skip)), takes


def _reads_shape(operation: Operation, entry: int) -> bool:
    if function_name(operation) == "expand_as":
        return operation.args[0] != Value(entry)
    return operation.target in SHAPE_ALONE or (operation.target is getattr and operation.args[1] == "shape")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_describable(conv: nn.Module) -> bool:
    try:
        describe_stage("", StageModules(conv, None, None))
    except NotFusable:
        return False
    return True


def _activation(operation: Operation) -> Activation | None:
    """What a function or method computes, its constant read."""
    if operation.kind == "method":
        name = METHODS.get(str(operation.target))
        return None if name is None or len(operation.args) != 1 else activation(name)
    found = recognise(operation.target) if operation.kind == "function" else None
    if found is None or found.kind.learned:
        return None
    given = bound(operation)
    if len(operation.args) > 1 and not given:  # a built-in, whose arguments have no names
        return None
    if found.name == "leaky_relu":
        slope = given.get("negative_slope", found.parameter)
        return Activation(found.name, float(slope)) if _is_number(slope) else None
    if found.name == "gelu":
        return {"none": found, "tanh": activation("gelu_tanh")}.get(given.get("approximate", "none"))
    return found


def _post_stages(path: Path, start: int) -> tuple[tuple[Stage, ...], int]:
    stages: list[Stage] = []
    i = start
    while i < len(path) and path[i].kind == "conv":
        stage = Stage(path[i].what)
        i += 1
        if i < len(path) and path[i].kind == "norm":
            stage = replace(stage, norm=path[i].what)
            i += 1
        if i < len(path) and path[i].kind == "act":
            stage = replace(stage, act=path[i].what)
            i += 1
        stages.append(stage)
    return tuple(stages), i - start


def _pre_stages(path: Path, start: int) -> tuple[tuple[Stage, ...], int]:
    stages: list[Stage] = []
    i = start
    while i < len(path) and path[i].kind == "norm":
        act = path[i + 1].what if i + 1 < len(path) and path[i + 1].kind == "act" else None
        conv = i + 1 if act is None else i + 2
        if conv >= len(path) or path[conv].kind != "conv":
            break
        stages.append(Stage(path[conv].what, path[i].what, act))
        i = conv + 1
    return tuple(stages), i - start


def _shared_norm(path: Path, start: int) -> tuple[Fused, int] | None:
    """A pre-activation block whose projection reads what the first norm and activation give."""
    if path[start].kind != "norm":
        return None
    head = 2 if start + 1 < len(path) and path[start + 1].kind == "act" else 1
    at = start + head
    if at >= len(path) or path[at].kind != "sum" or len(path[at].terms) != 2:
        return None
    terms = [_unscaled(term) for term in path[at].terms]
    for i, (branch, scale) in enumerate(terms):
        skip, skip_scale = terms[1 - i]
        whole = (*path[start:at], *branch)
        stages, length = _pre_stages(whole, 0)
        if branch and length == len(whole) and len(stages) > 1 and [item.kind for item in skip] == ["conv"]:
            in_place = path[at].in_place and i == 0
            projection = Stage(skip[0].what)
            fused = Fused(stages, "projection", projection, "pre", scale, skip_scale, in_place)
            return fused, head + 1
    return None


def _flat(item: Item) -> list[Path]:
    """The terms of a sum, and of sums within it."""
    return [inner for term in item.terms for inner in (_flat(term[0]) if [i.kind for i in term] == ["sum"] else [term])]


def _unscaled(path: Path) -> tuple[Path, float | str]:
    """Without the constant that it ends with."""
    if path and path[-1].kind == "scale":
        return path[:-1], path[-1].what
    return path, 1.0
