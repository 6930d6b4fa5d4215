"""The class that a fused module gets, and how it gets it.

As ``torch.nn.utils.parametrize`` does, fusing changes a module's class in place, to a subclass of its own. Children,
names, parameters, hooks, buffers and ``isinstance`` stay as they were.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters, module_state
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.block_modules import BlockModules, CompositeModules
from resnet_fused.modules.overlay import beneath, exchange
from resnet_fused.modules.plan import Described, Plan, describe_all, require_plain
from resnet_fused.ops.export import exports_plain
from resnet_fused.params import is_wrapper
from resnet_fused.spec import Memory

log = logging.getLogger("resnet_fused")


@dataclass(frozen=True)
class Settings:
    """What `fuse` was asked for."""

    backend: str
    memory: Memory


class Description:
    """What a module was at its last call: its tensors and spec, or None where its own forward has to run; and the state
    of the module for which that holds.

    The tensors carry what is known of them (`params.Kept`): folded weights, shapes that have been checked.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._last: tuple[Described | Plan | None, module_state.Snapshot | None] = (None, None)

    @property
    def block(self) -> Described | Plan | None:
        return self._last[0]

    def recall(self, module: nn.Module) -> tuple[Described | Plan | None, bool]:
        """The last description, and whether it describes this very module in its present state."""
        block, snapshot = self._last
        # a shallow copy, as nn.DataParallel makes them, brings the original's description along
        if snapshot is None or snapshot[0][0] is not module:
            return block, False
        return block, module_state.unchanged(snapshot)

    def keep(self, block: Described | Plan | None, snapshot: module_state.Snapshot | None) -> None:
        """All at once, since threads may share a module.

        snapshot: it begins with the module; None: the description is for this call only.
        """
        self._last = block, snapshot

    def __reduce__(self) -> tuple[type[Description], tuple[()]]:
        return type(self), ()  # a copy has other tensors


class FusedModule(nn.Module):
    """Mixin that stands before the original class; `FusedBlock` and `modules.stem` say what it then computes."""

    _fused_from: ClassVar[type[nn.Module]]
    _fused_class: ClassVar[type[FusedModule]]  # made of the mixin and `_fused_from` by `_make_class`
    _fused_keeps: ClassVar[type[Description]] = Description
    _fused_attributes: ClassVar[tuple[str, ...]] = ("_fused_settings", "_fused_description")  # what `eject` takes away
    _fused_settings: Settings
    _fused_description: Description

    def train(self, mode: bool = True) -> FusedModule:
        """As ``nn.Module.train``; on a change of mode, what evaluation folded is dropped, to be folded afresh."""
        if mode != self.training:
            self._fused_description.forget()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> FusedModule:
        """As ``nn.Module._apply`` (``to``, ``half``, ``cuda``); what was folded of the tensors is dropped first."""
        self._fused_description.forget()
        return super()._apply(*args, **kwargs)

    def fused_modules(self) -> BlockModules | CompositeModules:
        """The children by the part that they play; raises NotFusable."""
        adapter = adapters.find(self._fused_from)
        if adapter is None:  # unpickled where nobody has registered it
            raise NotFusable(f"{self._fused_from.__name__} is not registered here; call register_block")
        return adapter(self)

    def fused_describe(self) -> Described | Plan:
        """The tensors, spec and gate in the present state, or a plan of several such calls; raises NotFusable."""
        return describe_all(self.fused_modules(), self._fused_settings.memory)

    def fused_input(self, *given: Any) -> Tensor:
        """What the fused call reads, of the arguments of forward."""
        return given[0]

    def _fused_or_none(self, x: Tensor) -> Described | Plan | None:
        """`fused_describe`, kept while it holds. Where the original has to run, logs the reason and returns None."""
        # torch.fx (its x is a Proxy), torch.jit.trace and torch.export get the original: it runs without this package
        if not isinstance(x, Tensor) or exports_plain():
            return None
        if is_wrapper(x):
            _log_once(self._fused_from.__name__, f"its input is a {type(x).__name__}, which the kernels do not read")
            return None
        if torch.compiler.is_compiling():  # has its own guards
            return self._fused_describe_or_log()
        kept = self._fused_description
        last, holds = kept.recall(self)
        if holds:
            return last
        block = self._fused_describe_or_log()
        if block is not None:
            block = block.remember(last)
        kept.keep(block, module_state.snapshot(self._fused_parts()) if self._fused_lasts() else None)
        return block

    def _fused_describe_or_log(
        self, describe: Callable[[], Described | Plan | None] | None = None
    ) -> Described | Plan | None:
        try:
            described = self.fused_describe() if describe is None else describe()
            if described is not None:
                require_plain(described)
            return described
        except NotFusable as reason:
            if not torch.compiler.is_compiling():  # Dynamo has no loggers
                _log_once(self._fused_from.__name__, str(reason))
            return None

    def _fused_lasts(self) -> bool:
        """Whether a snapshot shows all that `fused_describe` reads. A registered adapter may read anything."""
        return adapters.is_built_in(self._fused_from)

    def _fused_parts(self) -> Iterable[nn.Module]:
        """The modules that `fused_describe` reads."""
        return self.modules()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: call resnet_fused.unfuse(model) first, or use "
            "torch.jit.trace or torch.export, which take the block's own forward"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made at run time, so pickle and deepcopy get the two classes that it is made of."""
        mixin = self._fused_class.__bases__[0]
        return _blank, (mixin, self._fused_from), self.__getstate__()


class FusedBlock(FusedModule):
    """A block: forward runs the fused operator, or the class's own forward where there is no fused form."""

    def forward(self, x: Tensor) -> Tensor:
        described = self._fused_or_none(x)
        if described is None:
            return super().forward(x)
        return described.run(x, self._fused_settings.backend)


class FusedSequential(FusedBlock):
    """A plain nn.Sequential, a chain by what it holds. Who calls its children instead gets what they compute."""

    def __getitem__(self, idx: slice | int) -> Any:
        """As nn.Sequential's; a part of the chain is a plain one."""
        if isinstance(idx, slice):
            return self._fused_from(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)  # type: ignore[misc]

    def fused_modules(self) -> BlockModules | CompositeModules:
        return sequential.chain(self)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class before `fuse`, and beneath what torch.distributed lays over it."""
    return module._fused_from if isinstance(module, FusedModule) else beneath(type(module))


def inject(module: nn.Module, mixin: type[FusedModule], settings: Settings) -> None:
    """Fuse one module, or give a fused one new settings."""
    if not isinstance(module, FusedModule):
        fused = _make_class(mixin, beneath(type(module)))  # type: ignore[arg-type]
        module.__class__ = exchange(type(module), fused)  # type: ignore[arg-type]
    module._fused_settings = settings  # type: ignore[assignment]
    module._fused_description = module._fused_keeps()  # type: ignore


def eject(module: FusedModule) -> None:
    """Undo `inject`. Raises TypeError where something else has changed the class since."""
    if beneath(type(module)) is not module._fused_class:
        raise TypeError(f"the fused module has become {type(module).__name__} (parametrized?); undo that before unfuse")
    for name in module._fused_attributes:
        delattr(module, name)
    module.__class__ = exchange(type(module), module._fused_from)  # type: ignore[arg-type, assignment]


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
