"""Faults to plant in a copy of the kernels: a test that does not notice them is no test."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from emulator.emulated import CUDA


@dataclass(frozen=True)
class Fault:
    """`text` of a kernel becomes `instead`. block: the one of `support.emulated_runs.RUNS` that it must show in."""

    file: str
    text: str
    instead: str
    block: str
    orders: int = 8  # of the threads that are tried


FAULTS = {
    "none": Fault("tile.cuh", "", "", "training"),
    # what threads of a worker wait for
    "buffer multiplied before it is whole": Fault(
        "tile.cuh", "sync_threads();  // the buffer is whole", "// the buffer is whole", "training"
    ),
    "buffer multiplied a copy too early": Fault("tile.cuh", "cp_async_wait<2>()", "cp_async_wait<3>()", "training"),
    "results read before they are complete": Fault(
        "epilogue.cuh", "sync_threads();  // the results are complete", "", "training"
    ),
    "results overwritten while they are read": Fault(
        "epilogue.cuh", "sync_threads();  // the results' place is free", "", "training"
    ),
    "partials of a weight overwritten while they are read": Fault(
        "weight_gradient.cuh", "sync_threads();  // the results' place is free", "", "training"
    ),
    "chain multiplies rows that are not there yet": Fault(
        "chain.cuh",
        "sync_threads();  // the results' place is free, and the resident rows can be read",
        "",
        "evaluation",
    ),
    # what workers wait for
    "no grid barrier": Fault("run_phases.cuh", "if (program.phases[i].barrier)", "if (false)", "training"),
    "ticket taken before all partials are written": Fault(
        "barriers.cuh", "int32_t* flag) {\n  sync_threads();", "int32_t* flag) {", "reductions", 32
    ),
    "last but one merges": Fault(
        "reductions.cuh", "r.tickets + block, lanes, sums.flag", "r.tickets + block, lanes - 1, sums.flag", "training"
    ),
    "last split left out": Fault(
        "weight_gradient.cuh", "i < w.splits; ++i) total", "i < w.splits - 1; ++i) total", "splits"
    ),
    # wrong places and values
    "swizzle of what is written alone": Fault(
        "convolution.cuh",
        "char* const to = buffer + chunk_offset(row(i), chunk, 8);",
        "char* const to = buffer + (row(i) * 8 + (chunk ^ (row(i) & 3))) * 16;",
        "training",
    ),
    "no padding left and right": Fault(
        "convolution.cuh", "static_cast<unsigned>(w) < static_cast<unsigned>(p.source_width)", "true", "training"
    ),
    "weights of the opposite tap": Fault(
        "convolution.cuh",
        "static_cast<int64_t>(column + n) * all + tap)",
        "static_cast<int64_t>(column + n) * all + all - 1 - tap)",
        "training",
    ),
    "padding after the activation": Fault("chain.cuh", "if (inside(first_row + row) &&", "if (true &&", "evaluation"),
    "no mask by the norm": Fault(
        "epilogue.cuh", "} else if (e.mask == Mask::by_norm) {", "} else if (false) {", "training"
    ),
    "means of tiles left at what they are relative to": Fault(
        "reductions.cuh", "moments.add(c, near + shift,", "moments.add(c, near,", "training"
    ),
}

OVERRUN = Fault(
    "packs.cuh",
    "DEVICE void store_first(T* to, int count) const {",
    "DEVICE void store_first(T* to, int count) const {\n    count += 1;",
    "",
)


def planted(fault: Fault, place: Path) -> Path:
    """A copy of csrc/cuda, as far as the emulator needs it, with the fault in it."""
    shutil.copytree(CUDA / "kernels", place / "kernels")
    (place / "launch").mkdir()
    shutil.copy(CUDA / "launch" / "launch.h", place / "launch")
    file = place / "kernels" / fault.file
    source = file.read_text()
    found = source.count(fault.text) if fault.text else 1
    if found != 1:
        raise ValueError(
            f"{fault.text!r} stands {found} times in {fault.file}: the kernels have changed, so must the fault"
        )
    file.write_text(source.replace(fault.text, fault.instead) if fault.text else source)
    return place
