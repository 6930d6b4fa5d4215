"""The record as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_bench.contestants import FUSED
from gpu_bench.setting import NETWORK


def markdown(record: dict[str, Any]) -> str:
    lines = [f"# {record['machine']['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in record["machine"].items()]
    rates = record["measured"]
    lines += [
        f"- reached here: {rates['bandwidth'] / 1e9:.0f} GB/s by a copy, "
        f"{rates['half_peak'] / 1e12:.1f} TFLOP/s by a bfloat16 product",
        "",
        "Ratios: eager's time over the contestant's in the same round, median (20th to 80th percentile); eager stands",
        "once for each set of contestants that took turns. GB/s counts the bytes that its own phases or operations",
        "must move; the floors are the fused phases', by data sheet and by the rates reached above.",
        *(f"Left out: {reason}" for reason in record.get("left_out", [])),
    ]
    for title, texts in (("Failed", record["errors"]), ("Dropped for lack of time", record["dropped"])):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {text.splitlines()[0]}" for text in texts)]
    networks = [g for g in record["groups"] if g["block"] == NETWORK]
    header = ["batch", "", "contestant", "images/s", "call ratio", "device ratio", "peak MiB beyond weights", "kernels"]
    rows = [
        [str(g["batch"]), g["direction"], name, *_network_row(f)]
        for g in networks
        for name, f in g["contestants"].items()
    ]
    lines += ["", "## ResNet-50, bfloat16 autocast", "", *_table(header, rows)]
    passes = [g for g in record["groups"] if any("of_copy" in f for f in g["contestants"].values())]
    header = ["pass", "batch", "", "contestant", "device us", "device ratio", "call ratio", "GB/s", "% of the copy's"]
    rows = [
        [g["block"], str(g["batch"]), g["direction"], name, *_pass_row(f)]
        for g in passes
        for name, f in g["contestants"].items()
    ]
    lines += ["", "## Passes between convolutions, bfloat16 channels_last", "", *_table(header, rows)]
    blocks = [g for g in record["groups"] if g["block"] != NETWORK and g not in passes]
    lines += ["", "## The best of ours and torch.compile", "", *_table(BEST, best_rows(blocks))]
    columns = ["block", "contestant", "device us", "device ratio", "call us", "call ratio", "TFLOP/s", "GB/s"]
    columns += ["% of floor", "% of measured floor", "kernels", "our launches"]
    for batch, direction in dict.fromkeys((g["batch"], g["direction"]) for g in blocks):
        same = [g for g in blocks if (g["batch"], g["direction"]) == (batch, direction)]
        rows = [[g["block"], name, *_block_row(f)] for g in same for name, f in g["contestants"].items()]
        lines += ["", f"## Blocks, {direction}, batch {batch}, bfloat16 channels_last", "", *_table(columns, rows)]
    return "\n".join(lines) + "\n"


BEST = ["block", "batch", "", "best of ours", "device ratio", "torch.compile's", "call ratio", "torch.compile's"]


def best_rows(blocks: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each block, batch and direction: our fastest on the device and torch.compile, each against its eager."""
    rows = []
    for where in dict.fromkeys((g["block"], g["batch"], g["direction"]) for g in blocks):
        found: dict[str, Any] = {}
        for g in blocks:
            if (g["block"], g["batch"], g["direction"]) == where:
                found |= {name: f for name, f in g["contestants"].items() if "device_ratio" in f}
        ours = [name for name in found if name in FUSED]
        if ours and "torch.compile" in found:
            best = max(ours, key=lambda name: found[name]["device_ratio"][1])
            pairs = [found[name][f"{kind}_ratio"] for kind in ("device", "call") for name in (best, "torch.compile")]
            rows.append([where[0], str(where[1]), where[2], best, *map(_spread, pairs)])
    return rows


def _network_row(f: dict[str, Any]) -> list[str]:
    peak = "" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**20:.0f}"
    ratios = [_spread(f.get(f"{kind}_ratio")) for kind in ("call", "device")]
    speed = f"{f['images_per_second']:.1f}" if f.get("call_ratio") else ""  # no figure without its peer
    return [speed, *ratios, peak, _number(f["kernels"], "d")]


def _pass_row(f: dict[str, Any]) -> list[str]:
    ratios = [_spread(f.get(f"{kind}_ratio")) for kind in ("device", "call")]
    share = _number(f.get("of_copy"), ".0%").rstrip("%")
    return [f"{f['device_seconds'][1] * 1e6:.1f}", *ratios, _number(f.get("gbytes"), ".0f"), share]


def _block_row(f: dict[str, Any]) -> list[str]:
    cells = []
    for kind in ("device", "call"):
        ratio = f.get(f"{kind}_ratio")
        cells += [f"{f[f'{kind}_seconds'][1] * 1e6:.1f}" if ratio else "", _spread(ratio)]
    cells += [_number(f.get("tflops"), ".1f"), _number(f.get("gbytes"), ".0f")]
    cells += [_number(f.get(name), ".0%").rstrip("%") for name in ("of_floor", "of_measured_floor")]
    return [*cells, _number(f["kernels"], "d"), _number(f["own_launches"], "d")]


def _spread(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
