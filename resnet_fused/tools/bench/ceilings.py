"""What this machine reaches at best: products of matrices, and copies. The lines of a roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from resnet_fused.tools.bench.rounds import timed
from resnet_fused.tools.tables import table

SIDES = (256, 512, 1024, 2048, 4096)  # of square matrices: from the second cache to memory
COPIED = 256 << 20  # bytes: beyond most caches
SECONDS = 0.2  # of one measurement, at least once
LONGEST = 2.0  # seconds of a call: bfloat16's 4096 x 4096 takes many minutes where PyTorch has a plain loop (AVX2)


class Ceiling(NamedTuple):
    """what: as in "bfloat16 product"; rate: per second, of `unit`; bytes: all operands together."""

    what: str
    detail: str
    bytes: int
    rate: float
    unit: str


class Ceilings(NamedTuple):
    rows: list[Ceiling]

    def table(self) -> str:
        rows = [[r.what, r.detail, f"{r.bytes / 2**20:.1f}", f"{r.rate / 1e9:.1f}", f"G{r.unit}/s"] for r in self.rows]
        title = f"Ceilings: the fastest of several repetitions, {torch.get_num_threads()} threads"
        return table(title, ("", "what was run", "operands, MiB", "rate", "unit"), rows)

    def to_dict(self) -> list[dict[str, Any]]:
        return [row._asdict() for row in self.rows]


def ceilings(device: str = "cpu", sides: tuple[int, ...] = SIDES, copied: int = COPIED) -> Ceilings:
    """Measured with torch's current threads: ``a @ b`` (oneDNN or MKL, on a GPU cuBLAS) and ``copy_``.

    The product of side n counts 2 n^3 operations; a copy counts what it reads and what it writes. Sides ascend, as far
    as a call is expected to take no more than LONGEST.
    """
    rows: list[Ceiling] = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rate = math.inf
        for side in sides:
            if 2 * side**3 / rate > LONGEST:
                break
            a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
            seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
            rate = 2 * side**3 / seconds
            rows.append(Ceiling(f"{name} product", f"torch.mm of {side} x {side}", 3 * a.nbytes, rate, "FLOP"))
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source))
    rows.append(Ceiling("copy", "Tensor.copy_, float32", 2 * copied, 2 * source.nbytes / seconds, "B"))
    return Ceilings(rows)


def _fastest(step: Callable[[], object]) -> float:
    """Seconds of the fastest call: what disturbs can only slow it down."""

    def synchronised() -> None:
        step()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    turn = timed(synchronised)
    turn()
    taken = [turn()]
    while sum(taken) < SECONDS and len(taken) < 1000:
        taken.append(turn())
    return min(taken)
