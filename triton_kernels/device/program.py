"""One kernel that walks a list of phases: a whole block in one launch, or each phase in its own.

A phase is (configuration, arguments). The frozen configuration is compiled in, and its type says which phase it is; the
arguments are pointers and sizes. Phases listed together run in one cooperative launch, with a grid barrier where one
reads what another wrote. For a phase listed alone the end of the launch is the barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barriers import grid_barrier
from .chained import chained
from .convolution import convolution
from .pointwise import pointwise
from .reductions import write_tables
from .weight_gradient import weight_gradient

CONVOLUTION, POINTWISE, WEIGHT_GRADIENT, CHAINED, TABLES = (
    "convolution",
    "pointwise",
    "weight_gradient",
    "chained",
    "tables",
)


@triton.jit
def run_phases(phases, counter, KINDS: tl.constexpr, CONFIGS: tl.constexpr, BARRIERS: tl.constexpr):
    """phases: a tuple of argument tuples. counter: int32 [1], zero before and after. BARRIERS[i]: before phase i."""
    for i in tl.static_range(len(KINDS)):
        if BARRIERS[i]:
            grid_barrier(counter)
        if KINDS[i] == "convolution":
            convolution(phases[i], CONFIGS, i)
        elif KINDS[i] == "pointwise":
            pointwise(phases[i], CONFIGS, i)
        elif KINDS[i] == "weight_gradient":
            weight_gradient(phases[i], CONFIGS, i)
        elif KINDS[i] == "chained":
            chained(phases[i], CONFIGS, i)
        else:
            write_tables(phases[i], 256)
