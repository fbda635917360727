"""Make the tables of docs/performance.md from the committed CSV files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from purify_fast.ops.dispatch.op import SIZES

from ..kept import machines
from ..prose import rendered
from ..speed import limits, sheets, shipping
from ..speed.sheets import table
from . import gpu_tables

#: The name of a file in a device's folder. The notes in this file are written by hand. They stand at the end of a CPU's
#: chapter, and at the beginning of a GPU's chapter.
NOTES = "notes.md"


def _measured_on(rows: list[dict]) -> str:
    made = (f"{row['date']}, torch {row['torch']}, triton {row['triton'] or 'absent'}" for row in rows)
    return "; ".join(dict.fromkeys(made))


def pipelines(folder: Path, *wanted: str) -> list[str]:
    """Return the table of some pipelines, with a line for each implementation and a column for each case.

    Args:
        folder: folder of a device's results.
        wanted: names of pipelines.
    """

    def memory(row: Mapping[str, str]) -> str:
        if not row["peak_MB"]:
            return ""
        return f", {int(row['peak_MB']):,} MB, {100 * float(row['share_of_matrix_rate']):.1f} %"

    rows = [row for row in sheets.read_csv(folder / sheets.PIPELINES) if row["pipeline"] in wanted]
    cases = list(dict.fromkeys((row["pipeline"], row["case"], row["shape"]) for row in rows))
    times = {(row["pipeline"], row["case"], row["contestant"]): row for row in rows}
    body = []
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        line = [gpu_tables.ours(contestant)]
        for pipeline, case, _ in cases:
            row = times.get((pipeline, case, contestant))
            line.append(f"{float(row['ms']):,.0f} ({row['speed_up']}){memory(row)}" if row and row["ms"] else "-")
        body.append(line)
    # In a shape, the text after the semicolon explains the name of the case. Leave this text out, because the page
    # explains the name too.
    heads = [f"{case}: {shape.partition(';')[0]}" for _, case, shape in cases]
    more = ", peak memory minus that of the loaded networks, share of the processor's matrix rate"
    what = f"Milliseconds (speedup over the plain form, which has 1.00){more if any(map(memory, rows)) else ''}"
    return [f"{machines(rows)}. {what}.", "", *table(["", *heads], body)]


def measured_races(raced: dict) -> list[str]:
    """Return the table of the results of `purify-fast tune` on a device.

    For each op the table shows the speedup of the kernel over the reference, and the cases in which the reference is
    used.
    """
    body = []
    for op, entry in raced["ops"].items():
        cells = []
        for style in ("eager", "replay", "graph"):
            ratios = sorted(row["reference_us"] / row["kernel_us"] for row in entry["rows"] if row["style"] == style)
            mean = statistics.geometric_mean(ratios) if ratios else 0.0
            cells.append(f"{mean:.1f} ({ratios[0]:.2g} to {ratios[-1]:,.2g})" if ratios else "-")
        behind = [
            name
            for name, who in entry["cells"].items()
            if name.endswith(tuple(SIZES)) and who.get("eager") == "reference"
        ]
        body.append([op, *cells, ", ".join(behind) or "-"])
    styles = ["eager calls", "replayed in a CUDA graph", "inside compiled graphs"]
    return table(["op", *styles, "cases that run the reference"], body)


def _measurements(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return the rows of ops.csv and of pipelines.csv in the folder of a device."""
    return sheets.rows_of(folder / sheets.ROWS), sheets.rows_of(folder / sheets.PIPELINES)


def chapter(folder: Path) -> list[str]:
    """Return the lines of a device's chapter, or an empty list if its folder has no measurements."""
    rows, races = _measurements(folder)
    raced = shipping.read(folder)
    if not (rows or races or raced):
        return []
    lines, notes = sheets.verdicts(rows), folder / NOTES
    called = {f"{line['op']} {line['direction']}": line for line in lines}
    behind = {name: line["behind_graph"] for name, line in called.items() if not line["behind_graph"].startswith("0/")}
    compared = [line for line in lines if line["worst_ratio"]]
    text = rendered(
        Path(__file__).with_name("chapter.md.jinja"),
        (gpu_tables.summary,),
        device=raced["machine"]["device"] if raced else (rows or races)[0]["device"],
        name=folder.name,
        gpu=folder.name != "cpu",
        tables=gpu_tables.tables(folder),
        pipelines={name: pipelines(folder, name) for name in dict.fromkeys(row["pipeline"] for row in races)},
        verdicts=lines,
        least=min(compared, key=lambda line: float(line["worst_ratio"]), default={}),
        in_graphs=[name for name, line in called.items() if line["in_graphs"] != "reference"],
        behind_in_graphs=[" ".join(pair) for pair in behind.items()],
        raced=raced,
        races=measured_races(raced) if raced else [],
        pages=[page for page, own in ((sheets.TABLE, rows), (sheets.PIPELINES_TABLE, races)) if own],
        notes=notes.read_text(encoding="utf-8") if notes.exists() else "",
    )
    return text.splitlines()


def folders(results: Path) -> list[Path]:
    """Return the folders of all measured devices."""
    return [path for path in sorted(results.iterdir()) if path.is_dir() and any(_measurements(path))]


def devices(results: Path) -> list[str]:
    """Return the table of all devices, with the measured rates of copies and of matrix products."""
    body = []
    for folder in folders(results):
        rows, races = _measurements(folder)
        measured = limits.read(folder)
        for device in dict.fromkeys(row["device"] for row in (*rows, *races)):
            own = [row for row in (*rows, *races) if row["device"] == device]
            raced = [float(row["matrix_GFLOP_per_s"]) for row in races if row["device"] == device]
            product = measured.get((device, limits.PRODUCT)) or max(raced, default=None)
            rates = measured.get((device, limits.COPY)), product
            cells = (f"{rate:,.0f}" if rate else "not measured" for rate in rates)
            body.append([device, *cells, _measured_on(own)])
    return table(["device", "copy, GB/s", "bfloat16 products, GFLOP/s", "measured"], body)


def chapters(results: Path) -> list[str]:
    """Return the lines of the chapters of all devices."""
    return "\n\n".join("\n".join(chapter(folder)) for folder in folders(results)).splitlines()
