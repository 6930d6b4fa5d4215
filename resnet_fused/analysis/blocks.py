"""A model's blocks by name, and the same model without its skip paths."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused.errors import NotFusable
from resnet_fused.modules import adapters
from resnet_fused.modules.adapters import register_block
from resnet_fused.modules.block_modules import BlockModules, CompositeModules, StageModules
from resnet_fused.modules.candidates import candidates
from resnet_fused.modules.fused_block import FusedBlock, FusedModule, inject, original_class
from resnet_fused.spec.activations import recognise


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks, residual or plain, fused or not, by qualified name in the order of ``model.named_modules()``.

    Raises ValueError for a model without one.
    """
    found = {name: module for name, module, whole in candidates(model) if whole}
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no residual block; accepted: a model whose blocks hold a convolution and "
            "a batch norm and add a skip path, or whose block class was given to register_block"
        )
    return found


def named(name: str, known: Iterable[str], what: str) -> str:
    """The name, if it is known. Raises ValueError with the nearest known names otherwise."""
    names = list(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or [*names[:2], *names[-2:]]
    raise ValueError(f"no {what} is named {name!r} ({len(names)} are known); near: {', '.join(map(repr, near))}")


def branch_modules(block: nn.Module) -> BlockModules:
    """The children of a block by the part that they play. Raises NotFusable for a block that no adapter describes."""
    adapter = adapters.find(original_class(block))
    if adapter is None:
        raise NotFusable(f"{original_class(block).__name__} is an unknown block class; register_block teaches it")
    modules = adapter(block)
    if isinstance(modules, CompositeModules):
        raise NotFusable(f"{original_class(block).__name__} has parts between its convolutions that are no stages")
    return modules


class PlainBlock(nn.Module):
    """A block's branch alone: its convolutions, norms and activations in their order, and no skip path.

    The children are those of the block, not copies. ``fuse`` knows this class, so that plain and residual networks run
    on the same operators.
    """

    def __init__(self, block: BlockModules) -> None:
        super().__init__()
        self.order = block.order
        self.branch_scale = block.branch_scale
        self.depth = len(block.stages)
        for i, stage in enumerate(block.stages):
            self.add_module(f"conv{i + 1}", stage.conv)
            self.add_module(f"norm{i + 1}", stage.norm)
            setattr(self, f"act{i + 1}", stage.act if isinstance(stage.act, nn.Module) else recognise(stage.act))

    def parts(self) -> BlockModules:
        return BlockModules(
            tuple(
                StageModules(*(getattr(self, f"{part}{i + 1}") for part in ("conv", "norm", "act")))
                for i in range(self.depth)
            ),
            skip="none",
            order=self.order,
            branch_scale=self.branch_scale,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C_out, H', W'], as the block's branch; plain PyTorch unless fused."""
        scale = self.branch_scale
        if isinstance(scale, Tensor):
            scale = scale.reshape(1, -1, 1, 1)
        for i, stage in enumerate(self.parts().stages):
            norm = stage.norm if stage.norm is not None else nn.Identity()
            if self.order == "pre":
                x = stage.conv(stage.act(norm(x)))  # type: ignore[operator, misc]
                continue
            last = i == self.depth - 1
            x = norm(stage.conv(x))
            if last and self.order == "post":
                x = x * scale
            x = stage.act(x)  # type: ignore[operator, misc]
        return x if self.order == "post" else x * scale


register_block(PlainBlock, PlainBlock.parts)  # type: ignore[arg-type]


def without_skips(model: nn.Module) -> nn.Module:
    """A copy of the model whose blocks are their branches alone, with the same weights, fused where they were fused.

    Raises NotFusable, naming the block, where no adapter says which children are the branch, and for a model without
    skip paths; ValueError for one without blocks.
    """
    plain = copy.deepcopy(model)
    parts = {name: _parts(name, block) for name, block in blocks(plain).items()}
    if all(modules.skip == "none" for modules in parts.values()):
        raise NotFusable(f"none of the {len(parts)} blocks of this {type(model).__name__} has a skip path to take out")
    for name, block in blocks(plain).items():
        branch = PlainBlock(parts[name]).train(block.training)
        if isinstance(block, FusedModule):
            inject(branch, FusedBlock, block._fused_settings)
        if not name:
            return branch
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, branch)
    return plain


def _parts(name: str, block: nn.Module) -> BlockModules:
    try:
        return branch_modules(block)
    except NotFusable as reason:
        raise NotFusable(f"the skip path of {name or 'the model'} cannot be taken out: {reason}") from reason


@torch.no_grad()
def open_branches(model: nn.Module) -> int:
    """Set to one each block's last norm weight that is all zero, in place; returns in how many blocks.

    Such blocks start as the identity (arXiv:1706.02677, timm's default): alone, their branches are constant.
    """
    opened = 0
    for block in blocks(model).values():
        try:
            norm = branch_modules(block).stages[-1].norm
        except NotFusable:
            continue
        if isinstance(norm, _BatchNorm) and norm.affine and not norm.weight.any():
            norm.weight.fill_(1.0)
            opened += 1
    return opened


@torch.no_grad()
def settle_statistics(model: nn.Module, x: Tensor) -> None:
    """Give every batch norm the statistics of this batch as its running ones, in place; modes stay as they are."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for norm in norms:
            norm.momentum = 1.0
        model.train()(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
