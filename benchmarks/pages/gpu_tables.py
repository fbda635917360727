"""Make the tables of a GPU's chapter in docs/performance.md from the results files in the GPU's folder."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from ..gpu.gpu_sections import PGD, STANDARD
from ..speed import kernel_times, limits, sheets

#: The times of captures, which a finished study measured.
CAPTURE_COST = "capture_cost.csv"
#: Two parts of the evaluation: without CUDA graphs, and with graphs where they save time.
OFF, AUTO = "graphs off", "graphs auto"


def ours(name: str) -> str:
    """Return the name of a compared implementation for a page: that of this package is in bold letters."""
    return f"**purify_fast{name.removeprefix('ours')}**" if name.startswith("ours") else name


def captures(folder: Path) -> list[str]:
    """Return the table of the times of a gradient step: launched, captured in a CUDA graph, and replayed."""
    body = []
    for row in sheets.rows_of(folder / CAPTURE_COST):
        times = (f"{float(row[f'{name}_ms']):.2f}" for name in ("eager_host", "eager", "graph", "device", "capture"))
        speedup = f"{float(row['eager_ms']) / float(row['graph_ms']):.2f}"
        body.append([row["images"], row["precision"], *times, speedup, row["pays_after"]])
    heads = ["launching, ms", "launched step, ms", "replayed step, ms", "on the device, ms", "capture, ms"]
    return sheets.table(["images", "precision", *heads, "speedup by replays", "steps that pay for a capture"], body)


def evaluations(folder: Path) -> list[str]:
    """Return the table of an evaluation by the protocol `standard`, without CUDA graphs and with them."""
    rows = sheets.rows_of(folder / STANDARD)
    parts = list(dict.fromkeys(row["part"] for row in rows))
    by_attack: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_attack.setdefault(row["attack"], {})[row["part"]] = row
    body = []
    for attack, own in by_attack.items():
        seconds = {part: float(row["seconds"]) for part, row in own.items()}
        times = [f"{seconds[part]:.2f}" if part in own else "-" for part in parts]
        gain = f"{seconds[OFF] / seconds[AUTO]:.2f}" if OFF in own and seconds.get(AUTO) else "-"
        left, other = (max(int(row[column]) for row in own.values()) for column in ("robust", "other_than_off"))
        body.append(["all attacks" if attack == "worst" else attack, *times, gain, left, other])
    heads = [f"{part}, s" for part in parts]
    return sheets.table(["attack", *heads, "speedup", "images still right", "images with another outcome"], body)


def pgd_forms(folder: Path) -> list[dict]:
    """Return the rows of the forms of an attack by PGD, with their ``share`` of the matrix rate (NaN if unknown)."""
    # A form that did not run in time has no milliseconds.
    rows, rates = [row for row in sheets.rows_of(folder / PGD) if row["ms"]], limits.read(folder)
    peaks = [rates.get((row["device"], limits.PRODUCT), math.nan) for row in rows]
    return [{**row, "share": 1e3 * float(row["TFLOP_per_s"]) / peak} for row, peak in zip(rows, peaks, strict=True)]


def pgd(folder: Path) -> list[str]:
    """Return the tables of the forms of an attack by PGD, and sentences that compare the fastest forms."""
    lines: list[str] = []
    rows = pgd_forms(folder)
    counts = list(dict.fromkeys(row.get("images") for row in rows))
    for count in counts:
        lines += [f"{count} images:", ""] if len(counts) > 1 else []
        lines += [*_pgd([row for row in rows if row.get("images") == count]), ""]
    return lines[:-1]


def _pgd(rows: list[dict]) -> list[str]:
    """Return the table of the forms for one number of images, and a sentence on the fastest of them."""
    times = {row["form"]: float(row["ms"]) for row in rows}
    best, mine = min(times, key=times.__getitem__), min(ms for form, ms in times.items() if form.startswith("ours"))
    body = []
    for row in rows:
        share = "-" if math.isnan(row["share"]) else f"{100 * row['share']:.0f} %"
        rates = f"{int(row['images_per_s']):,}", f"{float(row['TFLOP_per_s']):.0f}", share
        speed = mine / times[row["form"]]
        body.append([ours(row["form"]), f"{times[row['form']]:.1f}", *rates, f"{speed:.2f}"])
    heads = ["form", "ms", "images/s", "TFLOP/s", "share of the matrix rate", "times as fast as our fastest form"]
    ahead = f'**The fastest form is not ours:** "{best}" is {mine / times[best]:.2f} times as fast as our fastest form.'
    said = "The fastest form is one of this package." if best.startswith("ours") else ahead
    return [*sheets.table(heads, body), "", said]


def ratio(row: dict) -> float:
    """Return the speed of a kernel relative to its reference."""
    return float(row["reference_us"]) / float(row["kernel_us"])


def summary(rows: list[dict]) -> str:
    """Return a sentence about the times of all kernels of a GPU: how many were faster, and their mean speedups."""
    ratios = {
        words: [ratio(row) for row in rows if row["style"] == style] for style, words in kernel_times.STYLES.items()
    }
    means = [f"{statistics.geometric_mean(own):.1f} in {words}" for words, own in ratios.items() if own]
    return (
        f"In {sum(ratio(row) > 1 for row in rows):,} of {len(rows):,} measurements, the kernel was faster. The "
        f"geometric mean of all speedups is {' and '.join(means)}."
    )


def tables(folder: Path) -> dict[str, list[str]]:
    """Return the tables of a GPU's chapter by their names. A table is empty if the GPU's folder has no such results."""
    every = {CAPTURE_COST: captures, STANDARD: evaluations, PGD: pgd}
    return {table.__name__: table(folder) if (folder / file).exists() else [] for file, table in every.items()}
