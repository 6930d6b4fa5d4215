"""The class that a fused module gets, and how it gets it.

As ``torch.nn.utils.parametrize`` does, fusing changes a module's class in place, to a subclass of its own. Children,
names, parameters, hooks, buffers and ``isinstance`` stay as they were.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resnet_fused import adapters, functional
from resnet_fused.backends import folding
from resnet_fused.block import describe
from resnet_fused.errors import NotFusable
from resnet_fused.params import BlockParams
from resnet_fused.spec import BlockSpec, Memory

log = logging.getLogger("resnet_fused")


@dataclass(frozen=True)
class Settings:
    """What `fuse` was asked for."""

    backend: str
    memory: Memory


class FusedModule(nn.Module):
    """Mixin that stands before the original class; `FusedBlock` and `resnet_fused.stem` say what it then computes."""

    _fused_from: ClassVar[type[nn.Module]]
    _fused_class: ClassVar[type[FusedModule]]  # made of the mixin and `_fused_from` by `_make_class`
    _fused_settings: Settings

    def train(self, mode: bool = True) -> FusedModule:
        """As ``nn.Module.train``; on a change of mode, what evaluation folded is dropped, to be folded afresh."""
        if mode != self.training:
            try:
                weight = self.fused_describe()[0].stages[0].weight
            except NotFusable:
                pass
            else:
                folding.forget(weight)
        super().train(mode)
        return self

    def fused_describe(self) -> tuple[BlockParams, BlockSpec]:
        """The block's tensors and spec in its present state; raises NotFusable."""
        adapter = adapters.find(self._fused_from)
        if adapter is None:  # unpickled where nobody has registered it
            raise NotFusable(f"{self._fused_from.__name__} is not registered here; call register_block")
        return describe(adapter(self), self._fused_settings.memory)

    def _fused_or_none(self, x: Tensor) -> tuple[BlockParams, BlockSpec] | None:
        """`fused_describe`, or None, with the reason logged, where the class's own forward has to run."""
        # torch.fx (its x is a Proxy) and torch.jit trace the original
        if not isinstance(x, Tensor) or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return None
        try:
            return self.fused_describe()
        except NotFusable as reason:
            _log_once(self._fused_from.__name__, str(reason))
            return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made at run time, so pickle and deepcopy get its two ingredients."""
        mixin = self._fused_class.__bases__[0]
        return _blank, (mixin, self._fused_from), self.__getstate__()


class FusedBlock(FusedModule):
    """A block: forward runs the fused operator, or the class's own forward where that cannot be."""

    def forward(self, x: Tensor) -> Tensor:
        described = self._fused_or_none(x)
        if described is None:
            return super().forward(x)
        return functional.residual_block(x, *described, backend=self._fused_settings.backend)


def inject(module: nn.Module, mixin: type[FusedModule], settings: Settings) -> None:
    """Fuse one module, or give a fused one new settings."""
    if not isinstance(module, FusedModule):
        module.__class__ = _make_class(mixin, type(module))  # type: ignore[arg-type]
    module._fused_settings = settings  # type: ignore[assignment]


def eject(module: FusedModule) -> None:
    """Undo `inject`. Raises TypeError where something else has changed the class since."""
    if type(module) is not module._fused_class:
        raise TypeError(
            f"the fused module has become {type(module).__name__} (parametrized or sharded?); undo that before unfuse"
        )
    del module._fused_settings
    module.__class__ = module._fused_from  # type: ignore[assignment]


@cache
def _make_class(mixin: type[FusedModule], original: type[nn.Module]) -> type[FusedModule]:
    namespace = {"__module__": original.__module__, "__doc__": original.__doc__, "_fused_from": original}
    cls: type[FusedModule] = type(f"Fused{original.__name__}", (mixin, original), namespace)
    cls._fused_class = cls
    return cls


def _blank(mixin: type[FusedModule], original: type[nn.Module]) -> FusedModule:
    """An instance without state, for pickle to fill."""
    cls = _make_class(mixin, original)  # type: ignore[arg-type]
    return cls.__new__(cls)


@lru_cache(maxsize=1024)
def _log_once(block: str, reason: str) -> None:
    log.info("%s runs unfused: %s", block, reason)
