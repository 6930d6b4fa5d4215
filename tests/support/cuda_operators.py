"""The overloads `cuda` of the block's operators, and what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from support import operator_arguments
from support.blocks import Case
from support.emulated_checks import Checks

from resnet_fused.ops.encoding import encode

OPERATORS = ["forward", "backward", "infer"]


def operator(name: str) -> Any:
    return getattr(torch.ops.resnet_fused, f"residual_block_{name}").cuda


def arguments(
    name: str, case: Case, check: Checks, memory_format: torch.memory_format = torch.channels_last
) -> list[Any]:
    """Run as `check` was set."""
    given = list(operator_arguments.arguments(f"residual_block_{name}", case, torch.float32, memory_format))
    x, params, spec = case.build(torch.float32, memory_format)
    told = encode(spec, how=check.backend.how(spec, x, [p.weight for p in params.convs])).ints
    ints: list[int] = given[-2]  # type: ignore[assignment]
    ints[4] = told[4]
    ints[16::13] = [flags & 15 | way & 16 for flags, way in zip(ints[16::13], told[16::13], strict=True)]
    return given
