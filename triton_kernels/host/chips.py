"""What the planner has to know of a GPU: how many workers fit, and the bandwidth and peak that give the floors.

Sources: NVIDIA's data sheets and architecture white papers of A100, H100, H200, B200, and the CUDA C++ Programming
Guide's table of technical specifications per compute capability. Peaks are dense, bandwidths nominal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Chip:
    """sms: multiprocessors. shared: bytes of shared memory that a block may use; shared_sm: that a multiprocessor has.

    bandwidth: bytes/s of device memory. peak: {dtype: flop/s}, empty where no data sheet was read.
    gpu: its index in this machine; None where kernels are only planned for it.
    """

    name: str
    arch: int
    sms: int
    shared: int
    shared_sm: int
    bandwidth: float = 0.0
    half_peak: float = 0.0
    tf32_peak: float = 0.0
    fp32_peak: float = 0.0
    gpu: int | None = None

    @property
    def doubles(self) -> bool:
        """Whether float64 arithmetic runs at half the float32 rate (data-centre chips), not at a 64th."""
        return self.arch in (0, 80, 90, 100)

    def peak(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """flop/s of a matrix product with fp32 accumulation."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.half_peak
        return self.tf32_peak if tf32 else self.fp32_peak


KIB = 1024
# name, arch, SMs, shared memory per block and per SM, bandwidth, 16-bit, tf32, fp32
CHIPS = {
    "a100": Chip("A100 SXM 80 GB", 80, 108, 163 * KIB, 164 * KIB, 2.039e12, 312e12, 156e12, 19.5e12),
    "h100": Chip("H100 SXM", 90, 132, 227 * KIB, 228 * KIB, 3.35e12, 989e12, 495e12, 67e12),
    "h200": Chip("H200 SXM", 90, 132, 227 * KIB, 228 * KIB, 4.8e12, 989e12, 495e12, 67e12),
    "b200": Chip("B200", 100, 148, 227 * KIB, 228 * KIB, 8.0e12, 2250e12, 1100e12, 80e12),
}
# What the ahead-of-time check compiles for when only an architecture is named.
BY_ARCH = {
    80: CHIPS["a100"],
    86: Chip("sm_86", 86, 84, 99 * KIB, 100 * KIB),
    89: Chip("sm_89", 89, 128, 99 * KIB, 100 * KIB),
    90: CHIPS["h100"],
    100: CHIPS["b200"],
    120: Chip("sm_120", 120, 170, 99 * KIB, 100 * KIB),
}
# The interpreter runs workers one after another. Three of them: several, and each still has several tiles.
INTERPRETER = Chip("Triton interpreter", 0, 3, 227 * KIB, 228 * KIB)


@lru_cache(maxsize=64)
def of_device(index: int) -> Chip:
    """The GPU at `index`, as torch describes it."""
    p = torch.cuda.get_device_properties(index)
    arch = p.major * 10 + p.minor
    known = BY_ARCH.get(arch, BY_ARCH[80])
    for chip in CHIPS.values():
        if chip.arch == arch and chip.name.split()[0] in p.name:
            known = chip
    shared = getattr(p, "shared_memory_per_block_optin", known.shared)
    return Chip(
        p.name, arch, p.multi_processor_count, shared, known.shared_sm,
        known.bandwidth, known.half_peak, known.tf32_peak, known.fp32_peak, index,
    )  # fmt: skip
