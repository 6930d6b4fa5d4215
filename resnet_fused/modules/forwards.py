"""Blocks whose forward takes more than x, or reads x's size: what they do around their fused calls."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.modules.fused_block import FusedModule
from resnet_fused.modules.plan import Plan
from resnet_fused.spec import BlockSpec


class FusedWithShortcut(FusedModule):
    """For the blocks of deep layer aggregation, whose tree may hand them what their branch is added to."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        described = self._fused_or_none(x)
        if described is None:
            return super().forward(x, shortcut, children)
        if shortcut is not None and not isinstance(described, Plan):
            described = described._replace(spec=_without_skip(described.spec))
        return described.run(x, self._fused_settings.backend, shortcut)


class FusedRoot(FusedModule):
    """For the roots of deep layer aggregation, which take several maps."""

    shortcut: bool

    def forward(self, x_children: list[Tensor]) -> Tensor:
        described = self._fused_or_none(x_children[0])
        if described is None:
            return super().forward(x_children)
        shortcut = x_children[0] if self.shortcut else None
        return described.run(self.fused_input(x_children), self._fused_settings.backend, shortcut)

    def fused_input(self, *given: Any) -> Tensor:
        return torch.cat(given[0], 1)


class FusedPyramidPooling(FusedModule):
    """For an atrous pyramid's mean over all pixels, which is enlarged to x's size."""

    def forward(self, x: Tensor) -> Tensor:
        described = self._fused_or_none(x)
        if described is None:
            return super().forward(x)
        pooled = described.run(x, self._fused_settings.backend)
        return F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)


FORWARDS: dict[str, type[FusedModule]] = {
    "timm.models.dla.DlaBasic": FusedWithShortcut,
    "timm.models.dla.DlaBottleneck": FusedWithShortcut,
    "timm.models.dla.DlaBottle2neck": FusedWithShortcut,
    "timm.models.dla.DlaRoot": FusedRoot,
    "torchvision.models.segmentation.deeplabv3.ASPPPooling": FusedPyramidPooling,
}


@cache
def _without_skip(spec: BlockSpec) -> BlockSpec:
    """The same object for equal specs: what is kept of a block is known by its spec's identity."""
    return replace(spec, skip="none")
