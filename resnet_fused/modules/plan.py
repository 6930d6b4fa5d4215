"""What a fused module runs: one fused call, or a plan of several with PyTorch's own modules between.

A part without a fused form (a pooling, a blur, a gate in the middle of the branch) splits a block. What lies between
such parts is a fused call each, and the last one adds the skip path to its branch while it normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import functional
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    DenseModules,
    Modules,
    SplitModules,
    StepModules,
    describe,
)
from resnet_fused.ops.gate import Gate
from resnet_fused.params import BlockParams, same
from resnet_fused.spec import BlockSpec, Memory


class Described(NamedTuple):
    """One fused call: arguments of `functional.residual_block`."""

    params: BlockParams
    spec: BlockSpec
    gate: Gate | None

    def run(self, x: Tensor, backend: str, skip: Tensor | None = None) -> Tensor:
        return functional.residual_block(x, self.params, self.spec, gate=self.gate, residual=skip, backend=backend)

    def remember(self, last: Described | Plan | None) -> Described:
        """With what is known of the tensors, where `last` has the same ones."""
        if isinstance(last, Described) and last.spec == self.spec and same(self.params, last.params):
            return last._replace(gate=self.gate)
        return self

    @property
    def calls(self) -> list[Described]:
        return [self]


class Plan(NamedTuple):
    """`CompositeModules`, described. ``after(end(branch(before(x))) + skip(before(x)))``."""

    before: tuple[Step, ...]
    branch: tuple[Step, ...]
    end: Described | None
    skip: tuple[Step, ...] | None
    after: tuple[Step, ...]
    in_place_add: bool = False

    def run(self, x: Tensor, backend: str, skip: Tensor | None = None) -> Tensor:
        """skip: what is added in place of the plan's own skip path."""
        x = _run(self.before, x, backend)
        out = _run(self.branch, x, backend)
        if skip is None and self.skip is not None:
            skip = _run(self.skip, x, backend)
        if self.end is not None:
            out = self.end.run(out, backend, skip)
        elif skip is not None:
            out = (out + skip).to(out.dtype) if self.in_place_add else out + skip
        return _run(self.after, out, backend)

    def remember(self, last: Described | Plan | None) -> Plan:
        """As `Described.remember`, call by call."""
        if not isinstance(last, Plan) or len(last.calls) != len(self.calls):
            return self
        return self.carry(iter(last.calls))

    def carry(self, before: Iterator[Described]) -> Plan:
        """With what is known of the tensors of `before`, one for each call."""
        return Plan(
            _carry(self.before, before),
            _carry(self.branch, before),
            None if self.end is None else self.end.remember(next(before)),
            None if self.skip is None else _carry(self.skip, before),
            _carry(self.after, before),
            self.in_place_add,
        )

    @property
    def calls(self) -> list[Described]:
        """The fused ones, in the order of the fields."""
        end = () if self.end is None else (self.end,)
        return _calls((*self.before, *self.branch, *end, *(self.skip or ()), *self.after))


class Split(NamedTuple):
    """`SplitModules`, described."""

    paths: tuple[tuple[Step, ...], ...]
    cascade: int

    def run(self, x: Tensor, backend: str) -> Tensor:
        outs: list[Tensor] = []
        for i, (path, part) in enumerate(zip(self.paths, x.chunk(len(self.paths), 1), strict=True)):
            outs.append(_run(path, outs[-1] + part if 0 < i < self.cascade else part, backend))
        return torch.cat(outs, 1)

    def carry(self, before: Iterator[Described]) -> Split:
        """As `Plan.carry`."""
        return Split(tuple(_carry(path, before) for path in self.paths), self.cascade)

    @property
    def calls(self) -> list[Described]:
        """The fused ones, path by path."""
        return [call for path in self.paths for call in _calls(path)]


class Dense(NamedTuple):
    """`DenseModules`, described."""

    paths: tuple[tuple[Step, ...], ...]

    def run(self, x: Tensor, backend: str) -> Tensor:
        outs = [x]
        for path in self.paths:
            outs.append(_run(path, torch.cat(outs, 1), backend))
        return torch.cat(outs, 1)

    def carry(self, before: Iterator[Described]) -> Dense:
        """As `Plan.carry`."""
        return Dense(tuple(_carry(path, before) for path in self.paths))

    @property
    def calls(self) -> list[Described]:
        """The fused ones, path by path."""
        return [call for path in self.paths for call in _calls(path)]


Step = Described | Plan | Split | Dense | Callable[[Tensor], Tensor]


def describe_all(modules: Modules, memory: Memory) -> Described | Plan:
    """`describe`, for every fused call. Raises NotFusable."""
    if isinstance(modules, BlockModules):
        return Described(*describe(modules, memory), modules.gate)

    def step(given: StepModules) -> Step:
        if isinstance(given, SplitModules):
            return Split(tuple(steps(path) for path in given.paths), given.cascade)
        if isinstance(given, DenseModules):
            return Dense(tuple(steps(path) for path in given.paths))
        return describe_all(given, memory) if isinstance(given, (BlockModules, CompositeModules)) else given

    def steps(given: tuple[StepModules, ...]) -> tuple[Step, ...]:
        return tuple(step(each) for each in given)

    end = None if modules.end is None else Described(*describe(modules.end, memory), modules.end.gate)
    skip = None if modules.skip is None else steps(modules.skip)
    return Plan(
        steps(modules.before), steps(modules.branch), end, skip, steps(modules.after), in_place_add=modules.in_place_add
    )


def _run(steps: tuple[Step, ...], x: Tensor, backend: str) -> Tensor:
    for step in steps:
        x = step.run(x, backend) if isinstance(step, (Described, Plan, Split, Dense)) else step(x)
    return x


def _calls(steps: Iterable[Step]) -> list[Described]:
    return [call for step in steps if isinstance(step, (Described, Plan, Split, Dense)) for call in step.calls]


def _carry(steps: tuple[Step, ...], before: Iterator[Described]) -> tuple[Step, ...]:
    def one(step: Step) -> Step:
        if isinstance(step, Described):
            return step.remember(next(before))
        return step.carry(before) if isinstance(step, (Plan, Split, Dense)) else step

    return tuple(one(step) for step in steps)
