"""Make the tables of docs/performance.md from the committed CSV files and from the formulas of the benchmarks.

The tables show the work of ops and pipelines (bytes and FLOP), the shortest possible time for this work, and the
measured times.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from purify_fast.ops.dispatch.op import SIZES

from ..prose import rendered
from ..speed import limits, pipelines, sheets, shipping
from ..speed.ops import Case, registry
from ..speed.sheets import table
from ..speed.timing import AUTOTUNED

#: The name of a file in a device's folder. The notes in this file are written by hand, and stand at the end of the
#: device's chapter.
NOTES = "notes.md"
#: The assumed rates of an H200-class GPU: the bytes/s of a copy, and the FLOP/s of a bfloat16 product.
ASSUMED = (4.3e12, 790e12)
#: The compared implementations whose times are shown.
KINDS = ("eager", "compile", AUTOTUNED, "ours")
NOT_RUN = (
    "Nothing has been measured on a GPU yet. The numbers for a GPU on this page are counted or assumed. "
    "`python -m benchmarks gpu_check` measures a GPU, and its results become a chapter of this page. Until then the "
    "package uses a GPU kernel for eager calls only under two conditions: the kernel was verified on the user's own "
    "card, and the forward and backward kernels together replace at least a dozen launches. Inside a compiled graph, "
    "there is one more condition: compilers cannot fuse the reference of the op."
)


def standard(cases: list[Case]) -> Case:
    """Return the case that represents an op in the tables: the largest case of the op's first variant and dtype."""
    same = [case for case in cases if (case.variant, case.dtype) == (cases[0].variant, cases[0].dtype)]
    return max(same, key=lambda case: case.count("bytes", "forward"))


def limit(case: Case, direction: str, copied: float | None, multiplied: float | None) -> tuple[float, str] | None:
    """Return the lower limit of a case's time in seconds, and the cause of the limit ("bytes" or "FLOP").

    Args:
        case: case of an op.
        direction: "forward" or "backward".
        copied: bandwidth of a copy, measured or assumed, in bytes/s. If it is None, the result is None.
        multiplied: rate of bfloat16 products, measured or assumed, in FLOP/s. If it is None, the limit is that of the
            bytes.
    """
    if copied is None:
        return None
    moving = case.count("bytes", direction) / copied
    computing = case.count("flops", direction) / multiplied if multiplied else 0.0
    return (moving, "bytes") if moving >= computing else (computing, "FLOP")


def _counted(case: Case, what: str, direction: str) -> tuple[str, str]:
    """Return two cells of a table: the formula of the bytes or FLOP of a case, and their number in millions."""
    return f"`{case.formula(what, direction).replace('*', ' ')}`", f"{case.count(what, direction) / 1e6:,.1f}"


def _shape(case: Case) -> str:
    return " ".join(filter(None, case.named.values()))


def counted() -> list[str]:
    """Return the table of the work and the lower time limit of every op, at a shape that fills a GPU."""
    body = []
    for op, cases in registry("cuda").items():
        case = standard(cases())
        for direction in case.directions:
            bound = limit(case, direction, *ASSUMED)
            assert bound is not None
            cells = (*_counted(case, "bytes", direction), *_counted(case, "flops", direction))
            body.append([op, direction, _shape(case), *cells, f"{1e6 * bound[0]:,.1f}", bound[1]])
    return table(["op", "direction", "case", "bytes", "MB", "FLOP", "MFLOP", "limit, us", "by"], body)


def _rates(folder: Path, rows: list[dict], races: list[dict]) -> dict[str, tuple[float | None, float | None]]:
    """Return two rates for each device: bytes/s of a copy, and FLOP/s of a product. An unmeasured rate is None."""
    measured, rates = limits.read(folder), {}
    for device in dict.fromkeys(row["device"] for row in (*rows, *races)):
        raced = [1e9 * float(row["matrix_GFLOP_per_s"]) for row in races if row["device"] == device]
        product = measured.get((device, limits.PRODUCT)) or max(raced, default=None)
        rates[device] = measured.get((device, limits.COPY)), product
    return rates


def _measured_on(rows: list[dict]) -> str:
    made = (f"{row['date']}, torch {row['torch']}, triton {row['triton'] or 'absent'}" for row in rows)
    return "; ".join(dict.fromkeys(made))


def measured_ops(kind: str, rows: list[dict], rates: dict) -> list[str]:
    """Return the table of the times of eager calls and their lower limits, at one shape of every op."""
    columns = [name for name in KINDS if f"{name}_us" in rows[0]]
    served = {(line["op"], line["direction"]): line["eager_calls"] for line in sheets.verdicts(rows)}
    body = []
    for op, cases in registry(kind).items():
        case = standard(cases())
        wanted = {"op": op, **case.named, "style": "eager"}
        for direction in case.directions:
            for row in (r for r in rows if {**wanted, "direction": direction}.items() <= r.items()):
                bound = limit(case, direction, *rates[row["device"]])
                least, share = f"{1e6 * bound[0]:,.1f}" if bound else "-", "-"
                if bound and row["ours_us"]:
                    share = f"{100 * 1e6 * bound[0] / float(row['ours_us']):.0f} %"
                times = [f"{float(row[f'{c}_us']):,.1f}" if row.get(f"{c}_us") else "-" for c in columns]
                by = served.get((op, direction), "-")
                body.append([op, direction, _shape(case), least, *times, share, row["GB_per_s"], by, row["device"]])
    rates_and_place = ["share of the limit", "GB/s", "eager calls run", "device"]
    return table(["op", "direction", "case", "limit", *columns, *rates_and_place], body)


def measured_pipelines(races: list[dict], rates: dict) -> list[str]:
    """Return the table of the times of predictions and training steps, and of the lower limits for their arithmetic."""
    known = {name: cases(False) for name, cases in pipelines.registry().items()}
    body = []
    for (pipeline, name), rows in sheets.by_case(races).items():
        group = {row["contestant"]: row for row in rows}
        ours, first, case = group["ours"], rows[0], known.get(pipeline, {}).get(name)
        best = 1e3 * float(ours["GFLOP"]) * 1e9 / rates[ours["device"]][1]
        rivals = [row for who, row in group.items() if who.startswith("torch.compile")]
        compiled = [
            next((row for row in rivals if row["contestant"].endswith("bfloat16") == half), None)
            for half in (False, True)
        ]
        times = [f"{float(row['ms']):,.1f}" if row and row["ms"] else "-" for row in (first, *compiled, ours)]
        share = f"{100 * best / float(ours['ms']):.0f} %" if ours["ms"] else "-"
        parts = ", ".join(f"{100 * part:.0f} % {name}" for name, part in sheets.parts(ours)) or "-"
        cells = [f"{pipeline}: {name}; {ours['shape']}", f"`{case.flops}`" if case else "", ours["GFLOP"]]
        body.append([*cells, f"{best:,.1f}", *times, share, parts, ours["device"]])
    contestants = ["plain", "compiled", "compiled, bfloat16", "ours"]
    facts = ["share of the limit", "parts of its time", "device"]
    return table(["pipeline", "FLOP", "GFLOP", "limit, ms", *contestants, *facts], body)


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
    rates, raced = _rates(folder, rows, races), shipping.read(folder)
    if not (rows or races or raced):
        return []
    lines, notes = sheets.verdicts(rows), folder / NOTES
    called = {f"{line['op']} {line['direction']}": line for line in lines}
    behind = {name: line["behind_graph"] for name, line in called.items() if not line["behind_graph"].startswith("0/")}
    compared = [line for line in lines if line["worst_ratio"]]
    text = rendered(
        Path(__file__).with_name("chapter.md.jinja"),
        name=folder.name,
        ops=measured_ops("cpu" if folder.name == "cpu" else "cuda", rows, rates) if rows else [],
        verdicts=lines,
        least=min(compared, key=lambda line: float(line["worst_ratio"]), default={}),
        in_graphs=[name for name, line in called.items() if line["in_graphs"] != "reference"],
        behind_in_graphs=[" ".join(pair) for pair in behind.items()],
        raced=raced,
        races=measured_races(raced) if raced else [],
        pipelines=measured_pipelines(races, rates) if races else [],
        notes=notes.read_text(encoding="utf-8") if notes.exists() else "",
    )
    return text.splitlines()


def folders(results: Path) -> list[Path]:
    """Return the folders of all measured devices."""
    return [path for path in sorted(results.iterdir()) if path.is_dir() and any(_measurements(path))]


def devices(results: Path) -> list[str]:
    """Return the table of all devices, with their rates of a copy and of a product.

    If no GPU was measured, a note follows the table.
    """
    body = [["an H200-class GPU", *(f"{rate / 1e9:,.0f}" for rate in ASSUMED), "**assumed**, not measured"]]
    for folder in folders(results):
        rows, races = _measurements(folder)
        for device, rates in _rates(folder, rows, races).items():
            own = [row for row in (*rows, *races) if row["device"] == device]
            cells = (f"{rate / 1e9:,.0f}" if rate else "not measured" for rate in rates)
            body.append([device, *cells, _measured_on(own)])
    lines = table(["device", "copy, GB/s", "bfloat16 products, GFLOP/s", "measured"], body)
    return lines if any(folder.name != "cpu" for folder in folders(results)) else [*lines, "", NOT_RUN]


def chapters(results: Path) -> list[str]:
    """Return the lines of the chapters of all devices."""
    return "\n\n".join("\n".join(chapter(folder)) for folder in folders(results)).splitlines()
