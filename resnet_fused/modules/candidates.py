"""Which modules of a model are residual blocks, whether `fuse` knows their class or not."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from torch import nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters
from resnet_fused.modules.block_modules import called_by, class_path, frozen_norm
from resnet_fused.modules.fused_block import FusedModule, original_class
from resnet_fused.modules.stem import FusedStem, refused_stem, stem_runs
from resnet_fused.modules.structure import FusedByStructure

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # without a formula of their own
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# by their dimensions; what is fused comes first, the others are listed with this as their reason
LAYERS: dict[int, tuple[type[nn.Module], tuple[type[nn.Module], ...]]] = {
    2: (nn.Conv2d, NORMS),
    3: (nn.Conv3d, (nn.BatchNorm3d, nn.SyncBatchNorm)),
    1: (nn.Conv1d, (nn.BatchNorm1d, nn.SyncBatchNorm)),
}


class Candidate(NamedTuple):
    """name: qualified, "" for the model itself; whole: a block, and not perhaps a piece of one."""

    name: str
    module: nn.Module
    whole: bool


def candidates(model: nn.Module) -> list[Candidate]:
    """The blocks of a model, in the order of ``model.named_modules()``.

    Listed are modules of a known class. Of other classes, those are listed that hold a convolution and a batch norm at
    any depth and whose forward adds, by its source; of nested ones the innermost. So a block made of sub-modules is
    shown, and its pieces are not. Also listed are modules outside of these that have a convolution and a batch norm as
    children. A module that holds blocks is a network and no block. Behind a block follow the layers that are fused by
    themselves within it, and what a fused one calls as it is.
    """
    unique = {id(candidate.module): candidate for candidate in reversed(list(_within("", model)))}
    return list(reversed(unique.values()))


def _within(name: str, module: nn.Module) -> Iterator[Candidate]:
    inner = [
        candidate
        for child_name, child in module.named_children()
        for candidate in _within(f"{name}.{child_name}" if name else child_name, child)
    ]
    cls = original_class(module)
    if adapters.find(cls) is not None or isinstance(module, FusedModule):
        if isinstance(module, FusedStem):  # the one kind of block that has others beside it
            yield Candidate(name, module, whole=False)
            within = {id(part) for part in module._fused_parts()}
            yield from (candidate for candidate in inner if id(candidate.module) not in within)
        else:
            layer = class_path(cls) in adapters.LAYERS or cls is nn.Sequential
            layer = layer or (isinstance(module, FusedByStructure) and not _adds(cls))  # type: ignore[arg-type]
            yield Candidate(name, module, whole=not layer)
            yield from _by_themselves(module, inner)
    elif _is_block(module, inner):
        yield Candidate(name, module, whole=True)
        yield from _by_themselves(module, inner)
    elif not inner and _holds(list(module.children())) and not _is_network(module):
        yield Candidate(name, module, whole=False)
    else:
        if stem_runs(module) or refused_stem(module) is not None:
            yield Candidate(name, module, whole=False)
        yield from inner


def is_block(module: nn.Module) -> bool:
    """Whether a module of unknown class is listed as a block."""
    return _is_block(module, [each for name, child in module.named_children() for each in _within(name, child)])


def _by_themselves(block: nn.Module, inner: list[Candidate]) -> list[Candidate]:
    """Layers that are fused within a block which is left alone, and what a fused block calls as it is."""
    if not isinstance(block, FusedModule):
        return [candidate for candidate in inner if isinstance(candidate.module, FusedModule)]
    try:
        called = {id(part) for step in called_by(block.fused_modules()) for part in step.modules()}
    except NotFusable:
        return []
    return [candidate for candidate in inner if id(candidate.module) in called]


def _is_block(module: nn.Module, inner: list[Candidate]) -> bool:
    parts_only = not any(candidate.whole for candidate in inner)
    return parts_only and not _is_network(module) and _adds(type(module)) and _holds(list(module.modules()))  # type: ignore[arg-type]


def _is_network(module: nn.Module) -> bool:
    """A container, or what ends in a classifier: no formula of a block."""
    contains = isinstance(module, CONTAINERS) and any(type(module).forward is cls.forward for cls in CONTAINERS)
    return contains or any(type(child) is nn.Linear for child in module.children())


def dimensions(modules: Iterable[nn.Module]) -> int | None:
    """Of the convolutions among them that have a batch norm beside them: 2 if there are such, else 3 or 1; or None."""
    given = list(modules)
    for found, (conv, norm) in LAYERS.items():
        norms = any(isinstance(m, norm) or (found == 2 and frozen_norm(type(m)) is not None) for m in given)
        if norms and any(isinstance(module, conv) for module in given):
            return found
    return None


def _holds(modules: list[nn.Module]) -> bool:
    """A convolution and a batch norm."""
    return dimensions(modules) is not None


@cache
def _adds(cls: type[nn.Module]) -> bool:
    """Whether forward, or a method of the class that it calls, adds two values; False where there is no source."""
    waiting, seen = ["forward"], set(dir(nn.Module)) - {"forward"}
    while waiting:
        name = waiting.pop()
        method = getattr(cls, name, None)
        if name in seen or not callable(method):
            continue
        seen.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if _is_addition(node):
                return True
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                waiting.append(node.attr)
    return False


def _is_addition(node: ast.AST) -> bool:
    """x + y, x += y, x.add(y) or torch.add(x, y); a constant (a counter's 1) or a list is no path of a block."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in ("add", "add_")
    if not (isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add)):
        return False
    terms = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
    return not any(isinstance(term, (ast.Constant, ast.List, ast.Tuple, ast.JoinedStr)) for term in terms)
