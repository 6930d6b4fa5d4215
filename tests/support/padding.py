"""Blocks whose padding holds values of the picture."""

from __future__ import annotations

from dataclasses import replace

from support.blocks import Case

from resnet_fused.spec import PaddingMode

MODES: tuple[PaddingMode, ...] = ("circular", "reflect", "replicate")


def padded(case: Case, mode: PaddingMode) -> Case:
    """The block with every convolution, the projection included, padded by `mode`."""
    spec = case.spec
    stages = tuple(replace(s, padding_mode=mode) for s in spec.stages)
    projection = spec.projection and replace(spec.projection, padding_mode=mode)
    return replace(case, spec=replace(spec, stages=stages, projection=projection))
