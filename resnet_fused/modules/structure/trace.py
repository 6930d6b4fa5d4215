"""What a block's forward computes, as a list of operations, by torch.fx.

A copy is traced, with nothing but `x` given. Children of torch.nn, norms, fused modules and whatever has hooks are
operations of their own; nn.Sequential and modules of other classes are traced through, and where that fails, called as
they are.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import NORMS_WITH_ACT, class_path, is_norm
from resnet_fused.modules.fused_block import FusedModule, eject
from resnet_fused.modules.module_state import HOOKS
from resnet_fused.modules.operations import Operation, Value, look_up

OPAQUE = 16  # children that cannot be traced through, at most
KINDS = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "attribute"}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# results that may share their first argument's memory
VIEWS = (
    *("alias", "chunk", "contiguous", "detach", "double", "expand", "expand_as", "flatten", "float", "getattr"),
    *("getitem", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "to"),
    *("transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
)
WRITING_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")


@dataclass(frozen=True)
class Traced:
    """operations: in the order of calls, those that the output needs; output: the index of what is returned."""

    operations: tuple[Operation, ...]
    output: int


def trace(block: nn.Module) -> Traced:
    """Of the block in its present mode. Raises NotFusable where its forward is no fixed list of operations of x."""
    block = _unfused(block)
    arguments = _defaults(block)
    opaque: set[str] = set()
    while True:
        try:
            graph = _graph(copy.deepcopy(block), arguments, opaque)
            break
        except _Untraceable as child:
            if len(opaque) == OPAQUE or child.name in opaque:
                raise NotFusable(f"its forward cannot be traced: {child.reason}") from child
            opaque.add(child.name)
        except NotFusable:
            raise
        except Exception as error:  # whatever a forward does with what is no tensor
            raise NotFusable(f"its forward cannot be traced: {_first_line(error)}") from error
    traced = _simplified(block, _converted(graph))
    _require_no_shared_writes(block, traced)
    return traced


def takes_x_alone(block: nn.Module) -> bool:
    """Whether forward's signature is (self, x)."""
    return list(inspect.signature(type(block).forward).parameters)[1:] == ["x"]


def is_inactive(module: nn.Module) -> bool:
    """Whether calling it gives back its input: identities, and dropouts in evaluation."""
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    return type(module) is nn.Identity or (type(module) in DROPOUTS and (not module.training or bool(module.p == 0)))


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in HOOKS)


@contextlib.contextmanager
def unmoved_random_numbers() -> Iterator[Callable[[], bool]]:
    """The generators of torch (CPU), Python and NumPy end as they began; gives a function: whether any has moved."""
    numpy: Any = sys.modules.get("numpy.random")
    before = torch.get_rng_state(), random.getstate(), numpy and numpy.get_state(legacy=False)

    def moved() -> bool:
        same = torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        return not (same and str(before[2]) == str(numpy and numpy.get_state(legacy=False)))

    try:
        yield moved
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if numpy:
            numpy.set_state(before[2])


def _unfused(block: nn.Module) -> nn.Module:
    """A copy, of its original class; so are the layers in it, which are parts of it. Raises NotFusable."""
    try:
        copied = copy.deepcopy(block)
    except Exception as error:  # a tensor with a history, a lock
        raise NotFusable(f"it cannot be copied, so it cannot be traced: {_first_line(error)}") from error
    for module in copied.modules():
        layer = isinstance(module, FusedModule) and class_path(module._fused_from) in adapters.LAYERS
        if isinstance(module, FusedModule) and (module is copied or layer):
            eject(module)
    return copied


class _Untraceable(Exception):  # noqa: N818 - it names what to leave untraced
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.name, self.reason = name, reason


class _Proxy(fx.Proxy):
    """Keeps ``a += b`` as what it is; fx takes it for ``a = a + b``."""

    def _write(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._write(operator.itruediv, other)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self._opaque = opaque
        self._modes = _modes()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if name in self._opaque or isinstance(module, (FusedModule, torch.jit.ScriptModule)) or has_hooks(module):
            return True
        return is_norm(module) or class_path(type(module)) in NORMS_WITH_ACT or super().is_leaf_module(module, name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except (NotFusable, _Untraceable):
            raise
        except Exception as error:
            raise _Untraceable(self.path_of_module(m), _first_line(error)) from error

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise NotFusable("its forward switches autocast, autograd or what autograd saves, which no graph holds")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    devices = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]
    saves = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return torch.is_grad_enabled(), saves, *(torch.is_autocast_enabled(device) for device in devices)


def _defaults(block: nn.Module) -> dict[str, Any]:
    """The arguments of forward beside the first, by default. Raises NotFusable for another kind of forward."""
    if "forward" in block.__dict__:
        raise NotFusable("its forward is replaced on the instance")
    try:
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # compiled code
        parameters = []
    packed = any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD, each.KEYWORD_ONLY) for each in parameters)
    if not parameters or packed or any(each.default is each.empty for each in parameters[1:]):
        raise NotFusable("its forward does not take one tensor; accepted: forward(x), others by default")
    return {each.name: each.default for each in parameters[1:]}


def _graph(block: nn.Module, arguments: dict[str, Any], opaque: set[str]) -> fx.Graph:
    """Writes to `block` what its forward writes."""
    before = _attributes(block)
    with unmoved_random_numbers() as moved:
        graph = _Tracer(opaque).trace(block, arguments or None)
        if moved():
            raise NotFusable("its forward draws random numbers of its own, which no graph holds")
    after = _attributes(block)
    for name in after:
        if name not in before or after[name] is not before[name]:
            if "_tensor_constant" in name:
                raise NotFusable("its forward makes a tensor of its own, or uses one that is no parameter or buffer")
            raise NotFusable(f"its forward writes to self.{name}")
    return graph


def _attributes(block: nn.Module) -> dict[str, Any]:
    """Everything that the modules hold, by name."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            held = value if name in ("_parameters", "_buffers", "_modules") else {name: value}
            found |= {f"{path}.{key}" if path else key: each for key, each in held.items()}
    return found


def _converted(graph: fx.Graph) -> Traced:
    index: dict[fx.Node, int] = {}
    operations: list[Operation] = []

    def convert(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return Value(index[argument])
        if isinstance(argument, slice):
            return slice(convert(argument.start), convert(argument.stop), convert(argument.step))
        if isinstance(argument, dict):
            return {key: convert(value) for key, value in argument.items()}
        if isinstance(argument, (tuple, list)):
            return (list if isinstance(argument, list) else tuple)(convert(each) for each in argument)
        return argument

    output: Any = None
    for node in graph.nodes:
        index[node] = len(index)  # the first is x
        if node.op == "output":
            output = node.args[0]
        elif node.op != "placeholder":
            args, kwargs = convert(node.args), convert(node.kwargs)
            operations.append(Operation(index[node], KINDS[node.op], node.target, args, kwargs))  # type: ignore[arg-type]
    if not isinstance(output, fx.Node):
        raise NotFusable("its forward does not return one tensor")
    return Traced(tuple(operations), index[output])


def _simplified(block: nn.Module, traced: Traced) -> Traced:
    """Without what gives back its input, and without what the output does not need.

    Raises NotFusable where a call that nobody reads may matter: a module's, or one that writes.
    """
    stands_for: dict[int, int] = {}

    def rename(argument: Any) -> Any:
        if isinstance(argument, Value):
            return Value(stands_for.get(argument.number, argument.number))
        if isinstance(argument, slice):
            return slice(rename(argument.start), rename(argument.stop), rename(argument.step))
        if isinstance(argument, dict):
            return {key: rename(value) for key, value in argument.items()}
        if isinstance(argument, (tuple, list)):
            return type(argument)(rename(each) for each in argument)
        return argument

    kept: list[Operation] = []
    for operation in traced.operations:
        operation = operation._replace(args=rename(operation.args), kwargs=rename(operation.kwargs))
        if _gives_back(block, operation):
            stands_for[operation.number] = operation.args[0].number
        else:
            kept.append(operation)
    output = stands_for.get(traced.output, traced.output)
    needed = {output}
    for operation in reversed(kept):
        if operation.number in needed:
            needed |= operation.reads
        elif operation.kind == "module" or writes(block, operation):
            raise NotFusable(f"its forward calls {label(operation)} and does not use what it gives")
    return Traced(tuple(operation for operation in kept if operation.number in needed), output)


def _gives_back(block: nn.Module, operation: Operation) -> bool:
    """Whether it is the identity of its only argument."""
    if not operation.args or not isinstance(operation.args[0], Value):
        return False
    if operation.kind == "module":
        return len(operation.args) == 1 and not operation.kwargs and is_inactive(look_up(block, str(operation.target)))
    name = function_name(operation)
    drops = name == "stochastic_depth" or ("dropout" in name and getattr(F, name, None) is operation.target)
    return operation.kind == "function" and drops and bound(operation).get("training", True) is False


def bound(operation: Operation) -> dict[str, Any]:
    """A function's arguments by name; a method's and a built-in's that were given so."""
    try:
        found = inspect.signature(operation.target).bind(*operation.args, **operation.kwargs)
    except (TypeError, ValueError):
        return dict(operation.kwargs)
    found.apply_defaults()
    return dict(found.arguments)


def function_name(operation: Operation) -> str:
    """Of a function or a method."""
    return operation.target if isinstance(operation.target, str) else getattr(operation.target, "__name__", "")


def label(operation: Operation) -> str:
    """For a reason."""
    return operation.target if operation.kind in ("module", "attribute") else function_name(operation)


def writes(block: nn.Module, operation: Operation) -> bool:
    """Whether it changes its first argument."""
    if operation.kind == "module":
        return bool(getattr(look_up(block, str(operation.target)), "inplace", False))
    if operation.kind == "attribute":
        return False
    name = function_name(operation)
    if getattr(operator, name, None) is operation.target:
        return name in WRITING_OPERATORS
    return (name.endswith("_") and not name.startswith("__")) or bound(operation).get("inplace") is True


def _require_no_shared_writes(block: nn.Module, traced: Traced) -> None:
    """Raises NotFusable where a value is changed that is x, a parameter, or read again: a graph does not tell it."""
    made = {operation.number: operation for operation in traced.operations}
    readers: dict[int, list[Operation]] = {index: [] for index in (0, *made)}
    for operation in traced.operations:
        for index in operation.reads:
            readers[index].append(operation)
    for operation in traced.operations:
        if not writes(block, operation):
            continue
        written = operation.args[0] if operation.args else None
        maker = made.get(written.number) if isinstance(written, Value) else None
        shared = maker is None or maker.kind == "attribute" or _may_be_view(block, maker)
        others = [reader for reader in readers[written.number] if reader is not operation] if maker else []  # type: ignore[union-attr]
        if shared or any(reader.number > operation.number or _may_be_view(block, reader) for reader in others):
            raise NotFusable(f"{label(operation)} writes to a value that is read again")


def _may_be_view(block: nn.Module, operation: Operation) -> bool:
    if operation.kind == "module":
        module = look_up(block, str(operation.target))
        known = type(module).__module__.startswith("torch.nn.modules") or is_norm(module)
        return not known or isinstance(module, (nn.Flatten, nn.Unflatten, nn.Identity, *DROPOUTS))
    return function_name(operation) in VIEWS


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
