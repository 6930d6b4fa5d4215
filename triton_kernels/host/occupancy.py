"""How many workers fit on a multiprocessor, from a compiled kernel's registers and shared memory."""

from __future__ import annotations

from .chips import Chip

REGISTERS = 65536  # of a multiprocessor, on every architecture from sm_80
REGISTER_UNIT = 256  # a warp's registers are given out in units of this
RESERVED_SHARED = 1024  # bytes the system takes of a block's shared memory


def workers(chip: Chip, registers: int, warps: int, shared: int) -> int:
    """registers: per thread. shared: bytes per worker. 0 where not even one worker fits."""
    a_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    if shared > chip.shared:
        return 0
    threads = 1536 if chip.arch in (86, 89, 120) else 2048
    return min(REGISTERS // (a_warp * warps), chip.shared_sm // (shared + RESERVED_SHARED), threads // (32 * warps), 32)
