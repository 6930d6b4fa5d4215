"""What a fused module runs: one fused call, or a plan of several with PyTorch's own modules between.

A part without a fused form (a pooling, a blur, a gate in the middle of the branch) splits a block. What lies between
such parts is a fused call each, and the last one adds the skip path to its branch while it normalises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.modules.block_modules import BlockModules, Modules, StepModules, describe
from resnet_fused.modules.operations import Operations
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

    def run(self, x: Tensor, backend: str) -> Tensor:
        x = _run(self.before, x, backend)
        out = _run(self.branch, x, backend)
        if self.end is not None:
            skip = None if self.skip is None else _run(self.skip, x, backend)
            out = self.end.run(out, backend, skip)
        return _run(self.after, out, backend)

    def remember(self, last: Described | Plan | None) -> Plan:
        """As `Described.remember`, call by call."""
        if not isinstance(last, Plan) or len(last.calls) != len(self.calls):
            return self
        return self._carry(iter(last.calls))

    def _carry(self, before: Iterator[Described]) -> Plan:
        def carry(steps: tuple[Step, ...]) -> tuple[Step, ...]:
            return tuple(one(step) for step in steps)

        def one(step: Step) -> Step:
            if isinstance(step, Plan):
                return step._carry(before)
            if isinstance(step, Operations):
                return step.map_fused(lambda call: call.remember(next(before)))
            return step.remember(next(before)) if isinstance(step, Described) else step

        return Plan(
            carry(self.before),
            carry(self.branch),
            None if self.end is None else self.end.remember(next(before)),
            None if self.skip is None else carry(self.skip),
            carry(self.after),
        )

    @property
    def calls(self) -> list[Described]:
        """The fused ones, in the order of the fields."""
        return list(self._calls())

    def _calls(self) -> Iterator[Described]:
        for steps in (self.before, self.branch, (self.end,), self.skip or (), self.after):
            for step in steps:
                if isinstance(step, (Described, Plan)):
                    yield from step.calls
                elif isinstance(step, Operations):
                    yield from step.fused


Step = Described | Plan | nn.Module | Operations


def describe_all(modules: Modules, memory: Memory) -> Described | Plan:
    """`describe`, for every fused call. Raises NotFusable."""
    if isinstance(modules, BlockModules):
        return Described(*describe(modules, memory), modules.gate)

    def steps(given: tuple[StepModules, ...]) -> tuple[Step, ...]:
        return tuple(one(step) for step in given)

    def one(step: StepModules) -> Step:
        if isinstance(step, Operations):
            return step.map_fused(lambda call: describe_all(call, memory))
        return step if isinstance(step, nn.Module) else describe_all(step, memory)

    end = None if modules.end is None else Described(*describe(modules.end, memory), modules.end.gate)
    skip = None if modules.skip is None else steps(modules.skip)
    return Plan(steps(modules.before), steps(modules.branch), end, skip, steps(modules.after))


def _run(steps: tuple[Step, ...], x: Tensor, backend: str) -> Tensor:
    for step in steps:
        x = step(x) if isinstance(step, nn.Module) else step.run(x, backend)
    return x
