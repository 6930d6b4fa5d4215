"""`fuse` and `unfuse`: a model's residual blocks, and its stem, switched to fused operators and back, in place."""

from __future__ import annotations

from typing import TypeVar, get_args

from torch import nn

from resnet_fused import adapters, dispatch
from resnet_fused.block import class_path, describe
from resnet_fused.errors import NotFusable
from resnet_fused.fused_block import FusedBlock, FusedModule, Settings, eject, inject
from resnet_fused.spec import Memory
from resnet_fused.stem import FusedResNet, FusedTimmResNet

__all__ = ["FusedBlock", "fuse", "unfuse", "why_not"]

Model = TypeVar("Model", bound=nn.Module)

STEMS: dict[str, type[FusedModule]] = {
    "resnet_fused.models.resnet.ResNet": FusedResNet,
    "torchvision.models.resnet.ResNet": FusedResNet,
    "timm.models.resnet.ResNet": FusedTimmResNet,
}


def fuse(model: Model, *, backend: str = "auto", memory: Memory = "default") -> Model:
    """Switch every block of a known class to the fused operators, in place, and return the model.

    Known are torchvision's and timm's BasicBlock, Bottleneck and ResNet (its stem), this package's own, and what
    `register_block` has added. Parameters, buffers, names, hooks on the block and `state_dict` stay as they are.
    A block of another class, or one with a part that has no fused form, is left alone: `explain(model)` says why.
    A block that becomes such later runs its original forward, and the reason is logged to "resnet_fused".
    Fusing again changes the settings. Not supported: ``torch.jit.script`` of a fused model (unfuse it first).

    backend: "auto", or a name from `resnet_fused.backends()`; one that cannot run raises BackendError in forward.
    memory:  "default", or "low" to recompute in backward instead of keeping (`BlockSpec.memory`).

    Raises TypeError if model is not a module, ValueError for an unknown backend or memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    dispatch.check_name(backend)
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {', '.join(map(repr, get_args(Memory)))}, got {memory!r}")
    for module in model.modules():
        if isinstance(module, FusedModule) or why_not(module) is None:
            inject(module, STEMS.get(class_path(type(module)), FusedBlock), Settings(backend, memory))
    return model


def unfuse(model: Model) -> Model:
    """Give every fused module of the model its original class back, in place, and return the model.

    Raises TypeError where a fused module's class was changed again since (parametrized, sharded).
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            eject(module)
    return model


def why_not(module: nn.Module) -> str | None:
    """Why `fuse` leaves this (unfused) module alone, or None."""
    adapter = adapters.find(type(module))
    if adapter is None:
        return "unknown block class; register_block(cls, adapter) teaches it"
    try:
        describe(adapter(module), "default")
    except NotFusable as reason:
        return str(reason)
    return None
