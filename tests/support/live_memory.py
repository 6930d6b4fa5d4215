"""How much memory a call holds, from torch's own record of what it allocates and frees on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Bytes(NamedTuple):
    """allocated: in all, as if nothing were freed. peak: of what lived at the same time."""

    allocated: int
    peak: int


def live_memory(run: Callable[[], object]) -> Bytes:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return Bytes(sum(c for c in changes if c > 0), max(accumulate(changes)))
