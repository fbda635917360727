"""Make the tables of docs/performance.md from the committed CSV files."""

from __future__ import annotations

import statistics
from pathlib import Path

from ..kept import machines
from ..prose import rendered
from ..speed import kernel_times, limits, sheets
from ..speed.sheets import table
from . import gpu_tables

#: The folder of the CPUs. It has no chapter, because other pages have its tables.
CPU = "cpu"
#: The notes of a GPU, written by hand. They stand at the beginning of its chapter.
NOTES = "notes.md"


def _measured_on(rows: list[dict]) -> str:
    made = (f"{row['date']}, torch {row['torch']}, triton {row['triton'] or 'absent'}" for row in rows)
    return "; ".join(dict.fromkeys(made))


def pipelines(file: Path) -> list[str]:
    """Return a table of the pipelines: the time of a form, and the speeds of all forms relative to it.

    The table has a line for each case and a column for each implementation. The results have all times.

    Args:
        file: the results of a device's pipelines.
    """
    rows = [row | {"contestant": _form(row["contestant"])} for row in sheets.fewest_threads(sheets.read_csv(file))]
    cases = list(dict.fromkeys((row["pipeline"], row["case"], row["shape"]) for row in rows))
    times = {(row["pipeline"], row["case"], row["contestant"]): row for row in rows}
    groups = {at[:2]: group for at, group in sheets.by_case(rows).items()}
    by_expert = all(sheets.fastest(group, sheets.EXPERT) for group in groups.values())

    contestants = dict.fromkeys(row["contestant"] for row in rows)
    base, kind = ("the expert's faster form", sheets.EXPERT) if by_expert else ("the plain form", "plain")
    body = []
    for name, case, shape in cases:
        unit = sheets.fastest(groups[name, case], kind) if by_expert else float(times[name, case, kind]["ms"])
        of_case = [times.get((name, case, contestant)) for contestant in contestants]
        speeds = (f"{unit / float(row['ms']):.2f}" if unit and row and row["ms"] else "-" for row in of_case)
        # The text after the semicolon explains the name of the case, as the page does too.
        title = f"{METHODS.get(name, name)}, {case}: {shape.partition(';')[0]}"
        body.append([title, f"{unit:,.0f}", *speeds])
    head = ["", f"{base}, ms", *map(gpu_tables.ours, contestants)]
    return [f"Speed relative to {base}, on {machines(rows)}:", "", *table(head, body)]


#: The names of pipelines in the heads of tables.
METHODS = {
    "carso_inference": "CARSO",
    "carso_training": "CARSO",
    "atop_finetune": "AToP",
    "arrest_step": "ARREST",
    "pgd_forms": "attack",
}


def _form(contestant: str) -> str:
    """The name of a form in a table of several pipelines. The plain code of some pipelines has a longer name."""
    return contestant.removesuffix(" as released").removesuffix(", PyTorch defaults")


#: The explanations of forms in a table of pipelines, by the beginnings of their names.
ROWS = {
    "plain": "PyTorch in float32 with contiguous memory, as introductions teach it. No BatchNorm is folded, and the "
    "attacks also compute the gradients of the weights.",
    "torch.compile of plain": "the compiled networks of *plain*, under `torch.autocast` if bfloat16 is faster.",
    "expert": "the fastest code that we could write by published advice on PyTorch. Attacks compute only the gradient "
    "of the images, on a frozen copy of the network in channels_last with folded BatchNorms. The copy is in bfloat16, "
    "and training uses autocast, where a convolution is faster in bfloat16 than in float32.",
    "expert, compiled": "the expert's code under `torch.compile`: on a CPU in the default mode, on a GPU in the "
    "fastest mode. A step of an attack (forward pass, gradient and new point) is one compiled graph.",
    "ours": "this package: predictions and their gradients on a `frozen_copy`, and trainings in the faster precision.",
    "ours, compiled": "the same with `frozen_copy(compile=True)`, and trainings with `FitConfig(compile=True)`.",
}


def explained(folder: Path) -> list[str]:
    """Return a table that explains the forms of a device's pipelines, and their tables."""
    measured = sheets.read_csv(folder / sheets.PIPELINES)
    names = {_form(row["contestant"]) for row in measured}
    meanings = [[gpu_tables.ours(name).strip("*"), text] for name, text in ROWS.items() if name in names]
    return [*table(["form", "what it is"], meanings), "", *pipelines(folder / sheets.PIPELINES)]


#: The end of the name of the op that computes another op's gradients.
BACKWARD = "_backward"


def times_of_kernels(rows: list[dict]) -> list[str]:
    """Return the table of the speedups of a device's kernels, from the rows of kernels.csv.

    A cell has the speedup of an op, and then that of its backward.
    """
    lost: dict[str, list[str]] = {}
    for (op, variant), speedup in kernel_times.speedups(rows).items():
        slower = (size for size in sorted(speedup) if speedup[size] < 1)
        lost.setdefault(op, []).extend(f"{variant} {size:,}".strip() for size in slower)
    styles = [style for style in kernel_times.STYLES if any(row["style"] == style for row in rows)]

    def cell(op: str, style: str) -> str:
        ratios = sorted(gpu_tables.ratio(row) for row in rows if (row["op"], row["style"]) == (op, style))
        mean = statistics.geometric_mean(ratios) if ratios else 0.0
        return f"{mean:.1f} ({ratios[0]:.2g} to {ratios[-1]:,.2g})" if ratios else "-"

    body = []
    for op in dict.fromkeys(name.removesuffix(BACKWARD) for name in lost):
        both = (op, op + BACKWARD) if op + BACKWARD in lost else (op,)
        calls = [f"{'' if name == op else 'backward '}{call}" for name in both for call in lost.get(name, ())]
        body.append([op, *("; ".join(cell(name, style) for name in both) for style in styles), "; ".join(calls) or "-"])
    return table(["op", *(kernel_times.STYLES[style] for style in styles), "calls that run the reference"], body)


def _measurements(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return the rows of ops.csv and of pipelines.csv in the folder of a device."""
    return sheets.rows_of(folder / sheets.ROWS), sheets.rows_of(folder / sheets.PIPELINES)


def chapter(folder: Path) -> list[str]:
    """Return the lines of a device's chapter."""
    rows, races = _measurements(folder)
    timed = sheets.rows_of(folder / kernel_times.ROWS)
    notes = folder / NOTES
    text = rendered(
        Path(__file__).with_name("chapter.md.jinja"),
        (gpu_tables.summary,),
        device=(timed or rows or races)[0]["device"],
        name=folder.name,
        tables=gpu_tables.tables(folder),
        pipelines=pipelines(folder / sheets.PIPELINES) if races else [],
        by_expert=any(row["contestant"].startswith(sheets.EXPERT) for row in races),
        timed=timed,
        kernels=times_of_kernels(timed),
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
    return table(["device", "copy, GB/s", "products, GFLOP/s", "measured"], body)


def chapters(results: Path) -> list[str]:
    """Return the lines of the chapters of all GPUs."""
    return "\n\n".join("\n".join(chapter(folder)) for folder in folders(results) if folder.name != CPU).splitlines()
