"""Classes that torch.distributed lays over a module's own: those of ``fully_shard`` and ``replicate``.

They make a class of two bases, a mixin of theirs and the module's class, and give it to the module, as fusing does. A
fused class belongs beneath such an overlay: the overlay's hooks stand on the module, whatever its class is, and gather
the parameters before its forward. Told by name, so that nothing distributed is imported.
"""

from __future__ import annotations

from functools import cache

from torch import nn


def beneath(cls: type[nn.Module]) -> type[nn.Module]:
    """The class under the overlay, or cls itself. One that adds something of its own is no overlay."""
    if len(cls.__bases__) != 2 or any(not name.startswith("__") for name in vars(cls)):
        return cls
    mixin, original = cls.__bases__
    laid_over = mixin.__module__.startswith("torch.distributed.") and not issubclass(mixin, nn.Module)
    return original if laid_over and issubclass(original, nn.Module) else cls


@cache
def exchange(cls: type[nn.Module], replacement: type[nn.Module]) -> type[nn.Module]:
    """cls with `replacement` in place of the class under the overlay; without one, `replacement`."""
    original = beneath(cls)
    if original is cls:
        return replacement
    prefix = cls.__name__.removesuffix(original.__name__)
    kept = {name: value for name, value in vars(cls).items() if name in ("__deepcopy__", "__module__")}
    return type(f"{prefix}{replacement.__name__}", (cls.__bases__[0], replacement), kept)


def is_gathered(module: nn.Module) -> bool:
    """Whether fully_shard (or FullyShardedDataParallel) gathers this module's parameters for each forward."""
    return getattr(module, "_is_fsdp_managed_module", False)
