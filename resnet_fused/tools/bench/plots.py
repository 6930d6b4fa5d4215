"""The plots of a record as SVG, light and dark: bars of images/s, a roofline of the blocks, their memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from resnet_fused.tools.bench.contenders import OURS
from resnet_fused.tools.bench.rounds import Spread

Record = dict[str, Any]  # of `command.record`, or a part of it

WIDTH, LEFT, RIGHT = 760, 190, 24
STYLE = """
svg.plot { color-scheme: light dark; font: 13px system-ui, sans-serif; }
svg.plot { --ink: #1c2733; --soft: #5f6f80; --line: #d5dde5; --ours: #0a6ebd; --peer: #9fb0c1; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg.plot { --ink: #e4eaf0; --soft: #94a3b3; --line: #35424f; --ours: #58b1f5; --peer: #66788a; --paper: #141b22; }
}
svg.plot text { fill: var(--ink); } svg.plot .soft { fill: var(--soft); font-size: 12px; }
svg.plot .paper { fill: var(--paper); } svg.plot .grid { stroke: var(--line); fill: none; }
svg.plot .ours { fill: var(--ours); } svg.plot .peer { fill: var(--peer); }
svg.plot .hollow { fill: var(--paper); stroke: var(--soft); stroke-width: 1.5; }
svg.plot .roof { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg.plot .spread { stroke: var(--ink); stroke-width: 1.5; }
""".strip()


def plots(record: Record) -> dict[str, str]:
    """SVG by file name, as in "bars-eval-float32"; rooflines and memory only of runs whose blocks were measured."""
    drawn = {}
    for run in record["runs"]:
        key = f"{run['mode']}-{run['dtype']}"
        if run["contenders"]:
            drawn[f"bars-{key}"] = bars(run)
        if run["blocks"]:
            drawn[f"roofline-{key}"] = roofline(run, record["ceilings"])
            drawn[f"memory-{key}"] = memory(run)
    return drawn


def bars(run: Record) -> str:
    """Images per second of each contender, the 20th to 80th percentile as a line."""
    batch = run["batch"]
    rows = []
    for entry in run["contenders"]:
        spread = Spread(*(batch / seconds for seconds in reversed(Spread.of(entry["seconds"]))))
        ratio = entry["time_over_ours"]
        note = f"{spread.middle:.1f}" + (f", ours {ratio['p50']:.2f} x as fast" if ratio else "")
        rows.append((entry["name"], spread, note))
    scale = (WIDTH - LEFT - RIGHT - 170) / max(spread.high for _, spread, _ in rows)
    parts = []
    for i, (name, spread, note) in enumerate(rows):
        y, length = 44 + 30 * i, spread.middle * scale
        parts += [
            _text(LEFT - 10, y + 14, name, anchor="end"),
            _box(LEFT, y, length, 20, "ours" if name.startswith(OURS) else "peer"),
            _line(LEFT + spread.low * scale, y + 10, LEFT + spread.high * scale, y + 10, "spread"),
            _text(LEFT + max(length, spread.high * scale) + 8, y + 14, note, "soft"),
        ]
    return _svg(f"Images per second: {run['title']}", 54 + 30 * len(rows), parts)


def memory(run: Record) -> str:
    """Of each block, eager and fused: bytes saved for backward, in evaluation bytes read and written."""
    field, what = ("saved", "saved for backward") if run["mode"] == "train" else ("bytes", "read and written")
    rows = run["blocks"]
    scale = (WIDTH - LEFT - RIGHT - 120) / max(max(row["eager"][field], row["fused"][field], 1) for row in rows)
    parts = list(_legend())
    for i, row in enumerate(rows):
        y = 60 + 30 * i
        parts.append(_text(LEFT - 10, y + 14, row["name"], anchor="end"))
        for offset, side, colour in ((0, "fused", "ours"), (11, "eager", "peer")):
            parts.append(_box(LEFT, y + offset, row[side][field] * scale, 10, colour))
        longest = max(row["eager"][field], row["fused"][field]) * scale
        note = f"{row['fused'][field] / 2**20:.1f} of {row['eager'][field] / 2**20:.1f} MiB"
        parts.append(_text(LEFT + longest + 8, y + 15, note, "soft"))
    return _svg(f"Memory of each block, {what}: {run['title']}", 70 + 30 * len(rows), parts)


def roofline(run: Record, ceilings: Sequence[Record]) -> str:
    """FLOP/s over FLOP per byte of each block, below the measured rates of products and of a copy."""
    # 16 bits can be widened: without instructions for them float32's product is the faster one
    products = {"float32 product"} if run["dtype"] == "float32" else {"float32 product", "bfloat16 product"}
    best = max((row for row in ceilings if row["what"] in products), key=lambda row: row["rate"])
    peak = best["rate"]
    bandwidth = max(row["rate"] for row in ceilings if row["what"] == "copy")
    points = {
        side: [(row["flops"] / row[side]["bytes"], row["flops"] / row[side]["seconds"], row) for row in run["blocks"]]
        for side in ("eager", "fused")
    }
    every = [point for side in points.values() for point in side]
    across = _Axis.around([*(p[0] for p in every), peak / bandwidth], 80, WIDTH - RIGHT)
    up = _Axis.around([*(p[1] for p in every), peak], 420, 70)
    parts = list(_legend("hollow"))
    for value in across.ticks():
        x = across(value)
        parts += [_line(x, up.end, x, up.start, "grid"), _text(x, up.start + 18, f"{value:g}", "soft", "middle")]
    for value in up.ticks():
        y = up(value)
        label = f"{value / 1e9:g}"
        parts += [_line(across.start, y, across.end, y, "grid"), _text(across.start - 8, y + 4, label, "soft", "end")]
    parts.append(
        _text((across.start + across.end) / 2, up.start + 38, "FLOP per byte read and written", "soft", "middle")
    )
    parts.append(_text(8, up.end - 10, "GFLOP/s", "soft"))
    low, knee = across.low, peak / bandwidth
    start = max(low, up.low / bandwidth)
    path = [(start, start * bandwidth), (knee, peak), (across.high, peak)]
    corners = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in path)
    parts.append(f'<polyline class="roof" points="{corners}"/>')
    parts.append(_text(across.end, up(peak) - 8, f"{best['what']} {peak / 1e9:.0f} GFLOP/s", anchor="end"))
    parts.append(_text(across.start + 8, up.start - 8, f"slope: copy {bandwidth / 1e9:.1f} GB/s"))
    for (x0, y0, _), (x1, y1, _) in zip(points["eager"], points["fused"], strict=True):
        parts.append(_line(across(x0), up(y0), across(x1), up(y1), "grid"))
    for side, colour in (("eager", "hollow"), ("fused", "ours")):
        for x, y, row in points[side]:
            about = f"{row['name']}, {side}: {y / 1e9:.0f} GFLOP/s at {x:.1f} FLOP/byte"
            parts.append(
                f'<circle class="{colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="5">'
                f"<title>{escape(about)}</title></circle>"
            )
    worst = min(run["blocks"], key=lambda row: row["ratio"]["p50"])
    place = across(worst["flops"] / worst["fused"]["bytes"]), up(worst["flops"] / worst["fused"]["seconds"])
    parts.append(_text(place[0] + 9, place[1] + 4, worst["name"]))
    note = f"least gain: {worst['name']}, eager's time / fused time {worst['ratio']['p50']:.2f}"
    parts.append(_text(WIDTH - RIGHT, 46, note, "soft", "end"))
    return _svg(f"Roofline of the blocks: {run['title']}", 466, parts)


class _Axis(NamedTuple):
    """Logarithmic: values low to high at places start to end."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float) -> _Axis:
        values = list(values)
        return cls(min(values) / 1.6, max(values) * 1.6, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [m * 10.0**power for power in powers for m in (1, 2, 5) if self.low <= m * 10.0**power <= self.high]


def _legend(eager: str = "peer") -> Iterator[str]:
    yield _box(LEFT, 36, 12, 12, "ours")
    yield _text(LEFT + 18, 46, "fused", "soft")
    yield _box(LEFT + 70, 36, 12, 12, eager)
    yield _text(LEFT + 88, 46, "eager", "soft")


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    body = "\n".join([_box(0, 0, WIDTH, height, "paper"), _text(8, 20, title), *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</svg>"
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{style}"/>'


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{style}"/>'
