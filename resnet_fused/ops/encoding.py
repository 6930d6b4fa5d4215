"""A spec and what follows from it as two flat lists: the form in which they pass the operators' schemas.

csrc/block/spec.h decodes the same: 5 ints for the block, then 13 ints and 2 floats for each convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from resnet_fused.backends.how import CHOSEN, MODES, How
from resnet_fused.spec import BlockSpec, StageSpec
from resnet_fused.spec.activations import KINDS, Activation
from resnet_fused.spec.block import ORDERS, PADDING_MODES, SKIPS
from resnet_fused.spec.facts import JOIN_READS, ConvFacts, Facts, Needs, facts

HEADER, PER_CONVOLUTION = 5, 13
NAMES = tuple(KINDS)


class Decoded(NamedTuple):
    """What an operator is given beside its tensors."""

    spec: BlockSpec
    facts: Facts


class Encoded(NamedTuple):
    ints: list[int]
    floats: list[float]


def encode(spec: BlockSpec, needs: Needs | None = None, how: How = CHOSEN) -> Encoded:
    """needs: which gradients backward will be asked for. how: how kernels for a GPU run.

    The result is kept with the spec, except while a graph is traced.
    """
    if torch.compiler.is_compiling():
        return _encode(spec, needs, how)
    kept: dict[object, Encoded] = spec.__dict__.setdefault("_encoded", {})
    key = (None if needs is None else tuple(needs.flat), how)
    if key not in kept:
        kept[key] = _encode(spec, needs, how)
    return kept[key]


def _encode(spec: BlockSpec, needs: Needs | None, how: How) -> Encoded:
    known = facts(spec, needs)
    ints = [
        len(spec.stages),
        SKIPS.index(spec.skip),
        ORDERS.index(spec.order),
        JOIN_READS.index(known.join),
        MODES.index(how.mode) | how.tf32 << 1,
    ]
    floats: list[float] = []
    for i, (stage, conv) in enumerate(zip(spec.convs, known.convs, strict=True)):
        (sh, sw), (ph, pw), (dh, dw) = stage.geometry
        statistics = int(stage.norm) + int(stage.norm and stage.batch_stats)  # none, running, of the batch
        flags = conv.saved | conv.read << 1 | conv.wants_dy << 2 | conv.wants_dp << 3 | (i in how.library) << 4
        ints += [sh, sw, ph, pw, dh, dw, stage.groups, statistics]
        ints += [NAMES.index(stage.activation.name), conv.input_stage, conv.output_stage, flags]
        ints += [PADDING_MODES.index(stage.padding_mode)]
        floats += [stage.eps, stage.activation.parameter]
    return Encoded(ints, floats)


def decode(ints: Sequence[int], floats: Sequence[float]) -> Decoded:
    """The inverse of `encode`, except for what only forward needs: how much memory backward may keep."""
    return _decode(tuple(ints), tuple(floats))


@lru_cache(maxsize=1024)
def _decode(ints: tuple[int, ...], floats: tuple[float, ...]) -> Decoded:
    count, skip, order, join, _ = ints[:HEADER]
    stages, convs = [], []
    for i, at in enumerate(range(HEADER, len(ints), PER_CONVOLUTION)):
        sh, sw, ph, pw, dh, dw, groups, statistics, act, input_stage, output_stage, flags, mode = ints[
            at : at + PER_CONVOLUTION
        ]
        eps, parameter = floats[2 * i : 2 * i + 2]
        norm, activation = (statistics > 0, statistics == 2, eps), Activation(NAMES[act], parameter)
        stages.append(StageSpec((sh, sw), (ph, pw), (dh, dw), groups, *norm, activation, PADDING_MODES[mode]))
        saved, read, wants_dy, wants_dp = (bool(flags >> bit & 1) for bit in range(4))
        convs.append(ConvFacts(input_stage, output_stage, saved, read, wants_dy, wants_dp))
    projection = stages[count] if SKIPS[skip] == "projection" else None
    spec = BlockSpec(tuple(stages[:count]), SKIPS[skip], projection, ORDERS[order])
    return Decoded(spec, Facts(tuple(convs), JOIN_READS[join]))
