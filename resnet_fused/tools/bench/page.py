"""A record as one HTML page that needs no network: tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import compress

from resnet_fused.tools.bench.plots import Record, plots

NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'  # for files; HTML knows SVG
STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5f6f80; --line: #d5dde5; --paper: #ffffff; --mark: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4eaf0; --soft: #94a3b3; --line: #35424f; --paper: #141b22; --mark: #1d2a36; }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; font-size: 1.2rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
p, dd { color: var(--soft); } dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; margin: 0; }
dt { color: var(--ink); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.ours td { background: var(--mark); font-weight: 600; } td.text { text-align: left; white-space: normal; }
svg.plot { display: block; width: 100%; max-width: 50rem; margin: 1rem 0; }
""".strip()


def page(record: Record) -> str:
    """HTML of a record; every run with its table, plots and blocks."""
    drawn = {name: svg.replace(NAMESPACE, "") for name, svg in plots(record).items()}
    title = f"resnet_fused {record['machine']['resnet_fused']}, measured"
    parts = [f"<h1>{escape(title)}</h1>", _definitions(record["machine"] | record["versions"])]
    for run in record["runs"]:
        key = f"{run['mode']}-{run['dtype']}"
        parts.append(f"<h2>{escape(run['title'])}</h2>")
        parts.append(drawn.get(f"bars-{key}", ""))
        parts.append(_contenders(run))
        if run["absent"]:
            parts += ["<p>Not timed:</p>", _definitions(run["absent"])]
        if run["blocks"]:
            parts += [drawn[f"roofline-{key}"], drawn[f"memory-{key}"], _blocks(run)]
    if record["ceilings"]:
        parts += ["<h2>Ceilings of this machine</h2>", _ceilings(record)]
    parts.append(
        "<p>Contenders take turns, one step each per round. Ratios are a contender's time over ours in the same round: "
        "above 1, ours is faster; the median, and the 20th to 80th percentile. Peak memory is a process's largest "
        "resident size while it is timed, above what it was before the model was made ready; on a GPU what is "
        "allocated. Relative errors are against eager float32.</p>"
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + (
        "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _contenders(run: Record) -> str:
    header = ("", "images/s", "ms", "time / ours", "p20 to p80", "relative error", "peak MiB", "saved MiB")
    rows = []
    for entry in run["contenders"]:
        ratio, rate = entry["time_over_ours"], entry["images_per_second"]
        errors = " / ".join(f"{error:.0e}" for error in entry["errors"].values() if error is not None)
        spread = ["", ""] if ratio is None else [f"{ratio['p50']:.2f}", f"{ratio['p20']:.2f} to {ratio['p80']:.2f}"]
        sizes = ["" if size is None else f"{size / 2**20:.0f}" for size in (entry["peak_bytes"], entry["saved_bytes"])]
        rows.append([entry["name"], f"{rate:.1f}", f"{run['batch'] / rate * 1e3:.2f}", *spread, errors, *sizes])
    return _table(header, rows, marked=0) if rows else ""


def _blocks(run: Record) -> str:
    header = ("block", "input", "eager ms", "fused ms", "eager / fused", "p20 to p80", "GFLOP", "FLOP/byte, fused")
    rows = [
        [
            row["name"],
            "x".join(map(str, row["shape"])),
            f"{row['eager']['seconds'] * 1e3:.2f}",
            f"{row['fused']['seconds'] * 1e3:.2f}",
            f"{row['ratio']['p50']:.2f}",
            f"{row['ratio']['p20']:.2f} to {row['ratio']['p80']:.2f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops'] / row['fused']['bytes']:.1f}",
        ]
        for row in run["blocks"]
    ]
    return _table(header, rows)


def _ceilings(record: Record) -> str:
    rows = [
        [row["what"], row["detail"], f"{row['bytes'] / 2**20:.1f}", f"{row['rate'] / 1e9:.1f} G{row['unit']}/s"]
        for row in record["ceilings"]
    ]
    return _table(("", "what was run", "operands, MiB", "rate"), rows)


def _definitions(items: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in items.items())}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    kept = [not rows or any(row[i] for row in rows) for i in range(len(header))]  # no empty columns
    header, rows = list(compress(header, kept)), [list(compress(row, kept)) for row in rows]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=ours' if i == marked else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
