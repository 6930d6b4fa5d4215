"""`explain`: which backend each block of a model runs on, and why not another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import adapters, dispatch, how
from resnet_fused.block import FROZEN_NORM, class_path
from resnet_fused.errors import NotFusable
from resnet_fused.fuse import why_not
from resnet_fused.fused_block import FusedModule
from resnet_fused.stem import FusedStem, pool_reason
from resnet_fused.tables import table
from resnet_fused.tune import block_inputs


class Row(NamedTuple):
    """name: qualified, "" for the model itself; block: its original class; backend: "eager" is plain PyTorch."""

    name: str
    block: str
    backend: str
    reason: str


class Explanation(list[Row]):
    """One `Row` for each block, in the order of ``model.named_modules()``; ``str()`` gives the table."""

    def __str__(self) -> str:
        return table("Residual blocks", Row._fields, [(row.name or "(model)", *row[1:]) for row in self])

    def __repr__(self) -> str:
        return f"<Explanation of {len(self)} blocks>"


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Print and return, for each block of the model, the backend that it runs on now and the reason.

    x: an input of the model. On a GPU the choice depends on each block's input shape, and x tells it; without x a small
    input stands in. Given x the model runs once, in evaluation mode without gradients, and nothing in it changes.

    Fused blocks: what `auto` takes for the block's present state, dtype and device, and why it passed over others.
    The rest: why they are not fused; a class that is unknown is listed if it holds a convolution and a batch norm.
    A ResNet's own row is its stem.
    """
    rows = Explanation()
    inputs = {} if x is None else {module: given for _, module, given in block_inputs(model, x)}
    for name, module in model.named_modules():
        known = adapters.find(_original(module)) is not None
        if known or _looks_like_block(module):
            label = _original(module).__name__
            rows.append(Row(name, label, *_backend_and_reason(module, inputs.get(module))))
    print(rows)
    return rows


def _original(module: nn.Module) -> type[nn.Module]:
    return module._fused_from if isinstance(module, FusedModule) else type(module)


def _looks_like_block(module: nn.Module) -> bool:
    """Holds a convolution and a batch norm; a Sequential has no formula of its own, so it is none."""
    children = list(module.children())
    conv = any(isinstance(child, nn.Conv2d) for child in children)
    norm = any(isinstance(child, nn.BatchNorm2d) or class_path(type(child)) == FROZEN_NORM for child in children)
    return conv and norm and not isinstance(module, nn.Sequential)


def _backend_and_reason(module: nn.Module, x: Tensor | None) -> tuple[str, str]:
    if not isinstance(module, FusedModule):
        return "eager", why_not(module) or "not fused; call fuse(model)"
    try:
        params, spec = module.fused_describe()
    except NotFusable as reason:
        return "eager", str(reason)
    if x is None:
        weight = params.stages[0].weight
        x = weight.new_empty(1, weight.shape[1] * spec.stages[0].groups, 8, 8)  # stands for the block's input
    asked = module._fused_settings.backend
    with torch.set_grad_enabled(module.training):  # evaluation is taken to be without autograd, as `tune` takes it
        backend, notes = _dispatched(asked, dispatch.reasons(asked, x, params, spec))
    if x.device.type == "cuda" and x.dtype == torch.float32 and backend != "eager":
        notes.append(f"float32 products in {how.precision()}, as PyTorch's convolutions")
    if isinstance(module, FusedStem) and (pool := pool_reason(module.maxpool)) is not None:
        notes.append(pool)
    return backend, "; ".join(notes)


def _dispatched(asked: str, against: dict[str, str | None]) -> tuple[str, list[str]]:
    """(backend, notes): for "auto" the first without a reason against it, and the reasons before it."""
    if asked != "auto":
        reason = against.get(asked)
        return asked, ["asked for by name" if reason is None else f"forward raises: {reason}"]
    notes: list[str] = []
    for name, reason in against.items():
        if reason is None:
            return name, notes
        notes.append(f"{name}: {reason}")
    return "eager", notes
