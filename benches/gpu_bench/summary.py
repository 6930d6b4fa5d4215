"""From samples to percentiles, ratios and rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_bench.contestants import BENCHMARKED, FUSED, PASS, PEER
from gpu_bench.setting import NETWORK


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double()
    )
    return float(low), float(middle), float(high)


def summarize(group: dict[str, Any], costs: Callable[[str, int, str], dict[str, float]]) -> None:
    """Adds percentiles, ratios to eager round by round, and rates to a group's contestants."""
    contestants = group["contestants"]
    peer = contestants.get(PEER)
    for name, figures in contestants.items():
        for kind in ("device", "call"):
            times = [s[kind] for s in figures["samples"]]
            figures[f"{kind}_seconds"] = quantiles(times)
            if peer is not None:
                theirs = [s[kind] for s in peer["samples"]]
                figures[f"{kind}_ratio"] = quantiles([t / own for t, own in zip(theirs, times, strict=True)])
        seconds = figures["device_seconds"][1]
        if group["block"] == NETWORK:
            figures["images_per_second"] = group["batch"] / figures["call_seconds"][1]
            continue
        cost = costs(group["block"], group["batch"], group["direction"])
        if "pass_bytes" in cost:
            if name == PASS:
                figures["gbytes"] = cost["pass_bytes"] / seconds / 1e9
                figures["of_copy"] = cost["pass_bytes"] / seconds / cost["bandwidth"]
            continue
        if not cost:
            continue
        figures["tflops"] = cost["flops"] / seconds / 1e12
        if name in FUSED or name in (PEER, BENCHMARKED):
            figures["gbytes"] = cost["fused_bytes" if name in FUSED else "eager_bytes"] / seconds / 1e9
        for floor in ("floor", "measured_floor"):
            if floor in cost:
                figures[f"of_{floor}"] = cost[floor] / seconds
