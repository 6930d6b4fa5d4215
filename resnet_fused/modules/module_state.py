"""Whether modules are as they were: what lets a fused block keep its description from call to call.

A snapshot holds the class of each module and, by identity, every attribute and every entry of the dicts among them:
parameters, buffers, children, hooks, `training`, a replaced `forward`. Comparing takes about a microsecond per block.
What a snapshot cannot see is an attribute changed in place, such as a list; PyTorch's modules keep none that matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn

from resnet_fused.ops import operators

Snapshot = tuple[Any, ...]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = tuple(getattr(nn.modules.module, f"_global{kind}") for kind in HOOKS)


def snapshot(modules: Iterable[nn.Module]) -> Snapshot:
    """What csrc/python/module_state.h compares: (objects and classes, dict, its items, dict, its items, ...)."""
    classes: list[object] = []
    dicts: list[dict[Any, Any]] = [*GLOBAL_HOOKS]
    for module in modules:
        classes += [module, type(module)]
        dicts += [module.__dict__, *(value for value in module.__dict__.values() if isinstance(value, dict))]
    items = ((each, tuple(chain.from_iterable(each.items()))) for each in dicts)
    return tuple(classes), *chain.from_iterable(items)


def unchanged(taken: Snapshot) -> bool:
    """Whether everything is as it was when the snapshot was taken; False without the C++ extension, which compares."""
    return operators.unchanged(taken)
