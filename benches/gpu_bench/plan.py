"""Which contestants meet where, in what order."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_bench.contestants import BENCHMARKED, GRAPHED, PASS
from gpu_bench.setting import DIRECTIONS, NETWORK, Key, Setting


def plan(setting: Setting, autotune: bool) -> Iterator[tuple[str, Key, tuple[str, ...], list[str]]]:
    """(tier, key, directions, contestants), the quickest to prepare first: the last are dropped first."""
    batches = sorted(setting.batches, key=lambda batch: batch != setting.main_batch)
    both = ("training", "evaluation")

    def tier(name: str, network: list[str], block: list[str]) -> Iterator[tuple[str, Key, tuple[str, ...], list[str]]]:
        yield from ((name, (NETWORK, batch), both, network) for batch in batches)
        yield from ((name, (shape, batch), tuple(DIRECTIONS), block) for batch in batches for shape in setting.shapes())

    yield from tier("launches", [BENCHMARKED, *setting.networks()], [BENCHMARKED, *setting.fused()])
    yield from (("passes", (name, setting.main_batch), tuple(DIRECTIONS), [PASS]) for name in setting.passes())
    yield from (("graphs", (NETWORK, batch), ("evaluation",), list(GRAPHED)) for batch in setting.small_batches)
    for name in ("torch.compile", *(["torch.compile, max-autotune"] if autotune else [])):
        yield from tier(name, ["fused auto", name], [name])
