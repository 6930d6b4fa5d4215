"""`fuse` and `unfuse`: a model's residual blocks, and its stem, switched to fused operators and back, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Literal, TypeVar, get_args

from torch import nn

from resnet_fused.backends import dispatch
from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters, stem
from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.block_modules import called_by, class_path
from resnet_fused.modules.candidates import candidates, dimensions, is_block
from resnet_fused.modules.forwards import FORWARDS
from resnet_fused.modules.fused_block import (
    FusedBlock,
    FusedModule,
    FusedSequential,
    Settings,
    eject,
    inject,
    original_class,
)
from resnet_fused.modules.plan import describe_all
from resnet_fused.modules.structure import Found, fuse_by_structure, reason_against
from resnet_fused.ops import operators
from resnet_fused.spec import Memory

__all__ = ["FusedBlock", "MatchBy", "fuse", "require_module", "unfuse", "why_not"]

Model = TypeVar("Model", bound=nn.Module)
MatchBy = Literal["class", "structure"]
SHOWN = 3  # reasons in a warning


def fuse(model: Model, *, backend: str = "auto", memory: Memory = "default", match: MatchBy = "class") -> Model:
    """Switch every block of a known class to the fused operators, in place, and return the model.

    Known are blocks of torchvision, timm, transformers, segmentation_models_pytorch, detectron2, OpenMMLab, CLIP,
    MONAI (2-d), WeSpeaker, pyannote.audio, Ultralytics, Kornia, pytorchcv, Lightning Bolts, InsightFace
    (`modules.adapters` lists their classes; they are told by name, none is imported), this package's own, and what
    `register_block` has added; in any class also stems (`modules.stem`) and plain nn.Sequentials of convolutions,
    norms and ReLUs.
    Parameters, buffers, names, hooks on the block and `state_dict` stay as they are.
    A block of another class, or one with a part that has no fused form, is left alone: `explain(model)` says why.
    A block that loses its fused form later runs its original forward, and the reason is logged to "resnet_fused".
    Fusing again changes the settings. Exported and traced graphs are the unfused model's (`export_fused` keeps the
    fused operators). Not supported: ``torch.jit.script`` of a fused model (unfuse it first).

    backend: "auto", or a name from `resnet_fused.backends()`; one that cannot run raises BackendError in forward.
    memory:  "default", or "low": outputs that backward can compute again cheaply are not kept (`BlockSpec.memory`).
    match:   "class": known classes. "structure": then also blocks of other classes that `explain` lists. What their
             forward does is traced with torch.fx, in training and in evaluation; convolution, norm and activation in a
             row, additions, gates and constant scales become fused calls, everything else is called as it is. Then it
             is proven: a float64 copy of the block and its fused form run on random input, and outputs, gradients and
             buffers must agree. It is off by default since it runs your code when the model is fused (and where a
             block changes, or was unpickled, at its next call), needs about a second for large blocks, and relies on
             forward depending on nothing but x, tensors and attributes: a global variable that changes later, or an
             object of your own that does, is not seen.

    Warns where nothing is fused, and gives the first reasons; and once where backend is "auto" and the C++ extension is
    missing, so that PyTorch runs.
    Raises TypeError if model is not a module, ValueError for an unknown backend, memory or match.
    """
    require_module(model)
    dispatch.check_name(backend)
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {', '.join(map(repr, get_args(Memory)))}, got {memory!r}")
    if match not in get_args(MatchBy):
        raise ValueError(f"match must be one of {', '.join(map(repr, get_args(MatchBy)))}, got {match!r}")
    _fuse(model, Settings(backend, memory), _Unknown(model) if match == "structure" else None)
    _warn_of_what_is_left(model)
    if backend == "auto" and (reason := operators.load_error()) is not None:
        _warn_once(f"fused blocks run in plain PyTorch: {reason}")
    return model


class _Unknown:
    """The blocks of classes that no adapter knows, and what was found in them."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks: set[int] = set()
        self._found: list[Found] = []
        self.add([model])

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Those within `modules` that would be listed as blocks."""
        listed = (candidate.module for module in modules for candidate in candidates(module))
        self._blocks |= {id(m) for m in listed if not (isinstance(m, FusedModule) or adapters.find(original_class(m)))}

    def fuse(self, module: nn.Module, settings: Settings) -> None:
        """By its structure, if it is one of them; if it has no match, the blocks within it are added."""
        if id(module) not in self._blocks or original_class(module) is not type(module):  # sharded
            return
        if not fuse_by_structure(module, settings, self._found):
            self.add(module.children())


def _fuse(module: nn.Module, settings: Settings, unknown: _Unknown | None) -> None:
    """From the outside in: what a fused block holds runs within it, but for the modules that it calls as they are. A
    block that is left alone may hold others.

    unknown: None where only classes count.
    """
    if isinstance(module, FusedModule) or why_not(module) is None:
        inject(module, _mixin(original_class(module)), settings)
    elif unknown is not None:
        unknown.fuse(module, settings)
    within = {id(part) for part in module._fused_parts()} if isinstance(module, FusedModule) else set()
    called = _called(module)
    if unknown is not None:
        unknown.add(called)
    for part in called:
        _fuse(part, settings, unknown)
    for child in module.children():
        if id(child) not in within:
            _fuse(child, settings, unknown)


def _called(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, FusedModule):
        return []
    try:
        return called_by(module.fused_modules())
    except NotFusable:  # fused before, and changed since
        return []


def _mixin(cls: type[nn.Module]) -> type[FusedModule]:
    """For a class that is not fused yet."""
    if adapters.find(cls) is not None:
        return FORWARDS.get(class_path(cls), FusedBlock)
    return FusedSequential if cls is nn.Sequential else stem.mixin(cls)


def unfuse(model: Model) -> Model:
    """Give every fused module of the model its original class back, in place, and return the model.

    Raises TypeError if model is not a module, or where a fused module's class was changed again since (parametrized).
    """
    require_module(model)
    for module in model.modules():
        if isinstance(module, FusedModule):
            eject(module)
    return model


def why_not(module: nn.Module) -> str | None:
    """Why `fuse` leaves this (unfused) module alone, or None."""
    cls = original_class(module)
    adapter = adapters.find(cls)
    if adapter is None and cls is nn.Sequential:
        adapter = sequential.chain
    elif adapter is None and stem.stem_runs(module) and not is_block(module):
        adapter = stem.stem_modules
    if adapter is None and (reason := stem.refused_stem(module)) is not None:
        return reason
    if adapter is None and (found := dimensions(module.modules())) in (1, 3):
        return f"{found}-d convolutions have no fused form; accepted: nn.Conv2d"
    if adapter is None:
        if (reason := reason_against(module)) is not None:
            return f"no match by structure: {reason}"
        return 'unknown block class; register_block(cls, adapter) teaches it, match="structure" looks for its parts'
    try:
        describe_all(adapter(module), "default")
    except NotFusable as refusal:
        return str(refusal)
    return None


def require_module(model: object) -> None:
    """Raises TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _warn_of_what_is_left(model: nn.Module) -> None:
    """Where nothing is fused. That only some parts of a model are fused is usual."""
    if any(isinstance(module, FusedModule) for module in model.modules()):
        return
    left = candidates(model)
    if left:
        reasons = [f"{name or '(model)'} ({type(module).__name__}): {why_not(module)}" for name, module, _ in left]
        more = ["and more, see resnet_fused.explain(model)"] if len(reasons) > SHOWN else []
        told = "; ".join([*reasons[:SHOWN], *more])
        warnings.warn(f"fuse left blocks of this {type(model).__name__} unfused: {told}", stacklevel=3)
    else:
        warnings.warn(
            f"fuse found no block in this {type(model).__name__}: no convolution with a batch norm", stacklevel=3
        )


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
