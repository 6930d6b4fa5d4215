"""PyTorch's own operations between two values of a traced forward, to be run as they are between fused calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

OperationKind = Literal["module", "function", "method", "attribute", "fused"]


class Value(NamedTuple):
    """Within arguments: the result of an operation. 0 is the block's input."""

    number: int


class Operation(NamedTuple):
    """One operation of a traced forward.

    number: of its result.
    target: a child's name for "module", a parameter's or buffer's for "attribute", a method's, or the function itself;
            for "fused" what stands for a fused call.
    """

    number: int
    kind: OperationKind
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written

    @property
    def reads(self) -> set[int]:
        """The results that it takes."""
        return _read((self.args, self.kwargs))


@dataclass(frozen=True)
class Operations:
    """A step of a composite block: from the value `entry` to the value `exit`.

    calls: operations whose targets are modules, tensors, functions, methods' names and fused calls themselves.
    """

    calls: tuple[Operation, ...]
    entry: int
    exit: int

    @staticmethod
    def of(
        block: nn.Module,
        operations: tuple[Operation, ...],
        entry: int,
        leave: int,
        fused: Callable[[Any], Any],
    ) -> Operations:
        """With targets looked up by name in `block`, and `fused` of those of fused calls. Raises AttributeError."""

        def found(operation: Operation) -> Operation:
            if operation.kind == "fused":
                return operation._replace(target=fused(operation.target))
            named = operation.kind in ("module", "attribute")
            return operation._replace(target=look_up(block, operation.target)) if named else operation

        return Operations(tuple(found(operation) for operation in operations), entry, leave)

    @property
    def modules(self) -> list[nn.Module]:
        """Those that are called as they are."""
        return [call.target for call in self.calls if call.kind == "module"]

    @property
    def fused(self) -> list[Any]:
        """The fused calls: an adapter's `BlockModules`, and once described what runs them."""
        return [call.target for call in self.calls if call.kind == "fused"]

    def map_fused(self, change: Callable[[Any], Any]) -> Operations:
        """With each fused call changed, in their order."""
        calls = [call._replace(target=change(call.target)) if call.kind == "fused" else call for call in self.calls]
        return replace(self, calls=tuple(calls))

    def run(self, x: Tensor, backend: str = "eager") -> Tensor:
        """backend: of the fused calls."""
        values: dict[int, Any] = {self.entry: x}
        for number, kind, target, given, named in self.calls:
            if kind == "attribute":
                values[number] = target
                continue
            args, kwargs = _filled(given, values), _filled(named, values)
            if kind == "method":
                target, args = getattr(args[0], target), args[1:]
            elif kind == "fused":
                target, args = target.run, (args[0], backend)
            values[number] = target(*args, **kwargs)
        return values[self.exit]


def look_up(block: nn.Module, name: str) -> Any:
    """The child, parameter or buffer of this dotted name."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _filled(argument: Any, values: dict[int, Any]) -> Any:
    """`argument` with what its `Value`s stand for."""
    if isinstance(argument, Value):
        return values[argument.number]
    if isinstance(argument, (tuple, list)):
        return type(argument)([_filled(each, values) for each in argument])
    if isinstance(argument, dict):
        return {key: _filled(each, values) for key, each in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_filled(each, values) for each in (argument.start, argument.stop, argument.step)))
    return argument


def _read(argument: Any) -> set[int]:
    if isinstance(argument, Value):
        return {argument.number}
    if isinstance(argument, dict):
        return _read(tuple(argument.values()))
    if isinstance(argument, slice):
        return _read((argument.start, argument.stop, argument.step))
    if isinstance(argument, (tuple, list)):
        return set().union(*(_read(each) for each in argument)) if argument else set()
    return set()
