"""What a fused module runs: one fused call, or a plan of several with PyTorch's own modules between.

A part without a fused form (a pooling, a blur, a gate in the middle of the branch) splits a block. What lies between
such parts is a fused call each, and the last one adds the skip path to its branch while it normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.errors import NotFusable
from resnet_fused.modules.block_modules import (
    BlockModules,
    CompositeModules,
    DenseModules,
    Modules,
    SplitModules,
    StepModules,
    describe,
    has_hooks,
)
from resnet_fused.modules.operations import Operations
from resnet_fused.ops.gate import Gate
from resnet_fused.params import BlockParams, is_wrapper, same
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


class Pooled(NamedTuple):
    """A fused call and the max pooling behind it, as in a ResNet's stem."""

    call: Described

    def run(self, x: Tensor, backend: str) -> Tensor:
        return functional.residual_block_max_pool2d(x, self.call.params, self.call.spec, *POOL, backend=backend)

    def carry(self, before: Iterator[Described]) -> Pooled:
        """As `Plan.carry`."""
        return Pooled(self.call.remember(next(before)))

    @property
    def calls(self) -> list[Described]:
        return [self.call]


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
        x = take(self.before, x, backend)
        out = take(self.branch, x, backend)
        if skip is None and self.skip is not None:
            skip = take(self.skip, x, backend)
        if self.end is not None:
            out = self.end.run(out, backend, skip)
        elif skip is not None:
            out = (out + skip).to(out.dtype) if self.in_place_add else out + skip
        return take(self.after, out, backend)

    @property
    def sequence(self) -> tuple[Step, ...] | None:
        """Its steps, if they are taken one after the other and nothing else is done."""
        plain = self.end is None and self.skip is None
        return (*self.before, *self.branch, *self.after) if plain else None

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
            outs.append(take(path, outs[-1] + part if 0 < i < self.cascade else part, backend))
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
            outs.append(take(path, torch.cat(outs, 1), backend))
        return torch.cat(outs, 1)

    def carry(self, before: Iterator[Described]) -> Dense:
        """As `Plan.carry`."""
        return Dense(tuple(_carry(path, before) for path in self.paths))

    @property
    def calls(self) -> list[Described]:
        """The fused ones, path by path."""
        return [call for path in self.paths for call in _calls(path)]


Step = Described | Pooled | Plan | Split | Dense | Operations | Callable[[Tensor], Tensor]
FUSED = (Described, Pooled, Plan, Split, Dense)
POOL = (3, 2, 1)  # kernel_size, stride, padding: the pooling that a fused call takes with it


def describe_all(modules: Modules, memory: Memory) -> Described | Plan:
    """`describe`, for every fused call. Raises NotFusable."""
    if isinstance(modules, BlockModules):
        return Described(*describe(modules, memory), modules.gate)

    def step(given: StepModules) -> Step:
        if isinstance(given, SplitModules):
            return Split(tuple(steps(path) for path in given.paths), given.cascade)
        if isinstance(given, DenseModules):
            return Dense(tuple(steps(path) for path in given.paths))
        if isinstance(given, Operations):
            return given.map_fused(lambda call: describe_all(call, memory))
        return describe_all(given, memory) if isinstance(given, (BlockModules, CompositeModules)) else given

    def steps(given: tuple[StepModules, ...]) -> tuple[Step, ...]:
        described: list[Step] = []
        for each in given:
            last = described[-1] if described else None
            if (
                isinstance(last, Described)
                and last.gate is None
                and isinstance(each, nn.Module)
                and pool_reason(each) is None
            ):
                described[-1] = Pooled(last)
            else:
                described.append(step(each))
        return tuple(described)

    end = None if modules.end is None else Described(*describe(modules.end, memory), modules.end.gate)
    skip = None if modules.skip is None else steps(modules.skip)
    return Plan(
        steps(modules.before), steps(modules.branch), end, skip, steps(modules.after), in_place_add=modules.in_place_add
    )


def require_plain(described: Described | Plan) -> None:
    """Raises NotFusable where a tensor is made of others, as tensor parallelism and quantisation have them."""
    for call in described.calls:
        for tensor in call.params.tensors:
            if is_wrapper(tensor):
                raise NotFusable(f"a parameter or buffer is a {type(tensor).__name__}, which the kernels do not read")


def pool_reason(pool: nn.Module) -> str | None:
    """Why this module is not the max pooling that a fused call takes with it, or None."""
    if type(pool) is not nn.MaxPool2d:
        return f"{type(pool).__name__}; accepted: nn.MaxPool2d itself"
    window = [v if isinstance(v, int) else tuple(v) for v in (pool.kernel_size, pool.stride, pool.padding)]
    plain = all(v in (wanted, (wanted, wanted)) for v, wanted in zip(window, POOL, strict=True))
    if not plain or pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return f"{pool}; accepted: a 3x3 window, stride 2, padding 1"
    return f"{pool}, which has hooks, which would not run" if has_hooks(pool) else None


def take(steps: tuple[Step, ...], x: Tensor, backend: str) -> Tensor:
    """One after the other."""
    for step in steps:
        x = step.run(x, backend) if isinstance(step, (*FUSED, Operations)) else step(x)
    return x


def _calls(steps: Iterable[Step]) -> list[Described]:
    found: list[Described] = []
    for step in steps:
        if isinstance(step, Operations):
            found += step.fused
        elif isinstance(step, FUSED):
            found += step.calls
    return found


def _carry(steps: tuple[Step, ...], before: Iterator[Described]) -> tuple[Step, ...]:
    def one(step: Step) -> Step:
        if isinstance(step, Operations):
            return step.map_fused(lambda call: call.remember(next(before)))
        if isinstance(step, Described):
            return step.remember(next(before))
        return step.carry(before) if isinstance(step, FUSED) else step

    return tuple(one(step) for step in steps)
