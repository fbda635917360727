"""Make the tables of docs/performance.md from the committed CSV files."""

from __future__ import annotations

import statistics
from pathlib import Path

from purify_fast.ops.dispatch.op import SIZES

from ..prose import rendered
from ..speed import limits, sheets, shipping
from ..speed.sheets import table

#: The name of a file in a device's folder. The notes in this file are written by hand, and stand at the end of the
#: device's chapter.
NOTES = "notes.md"
NOT_RUN = (
    "Nothing has been measured on a GPU yet. The numbers for a GPU on this page are counted or estimated. "
    "`python -m benchmarks gpu_check` measures a GPU, and its results become a chapter of this page. Until then the "
    "eager calls use a GPU kernel only if two conditions hold: the kernel was verified on the user's own card, and the "
    "forward and backward kernels together replace at least a dozen launches. Inside a compiled graph, there is one "
    "more condition: compilers cannot fuse the reference of the op."
)


def _measured_on(rows: list[dict]) -> str:
    made = (f"{row['date']}, torch {row['torch']}, triton {row['triton'] or 'absent'}" for row in rows)
    return "; ".join(dict.fromkeys(made))


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
        name=folder.name,
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
    """Return the table of all devices, with the measured rates of copies and of matrix products.

    If no GPU was measured, a note follows the table.
    """
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
    lines = table(["device", "copy, GB/s", "bfloat16 products, GFLOP/s", "measured"], body)
    return lines if any(folder.name != "cpu" for folder in folders(results)) else [*lines, "", NOT_RUN]


def chapters(results: Path) -> list[str]:
    """Return the lines of the chapters of all devices."""
    return "\n\n".join("\n".join(chapter(folder)) for folder in folders(results)).splitlines()
