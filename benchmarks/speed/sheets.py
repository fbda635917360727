"""The tables and pictures made from the CSV files, and the kernels chosen for the ops."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from purify_fast._files import write_text
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.racing import IN_GRAPHS

from .. import style
from ..prose import rendered
from .timing import AUTOTUNED, CONTESTANTS, LEAST, STYLES

ROWS, TABLE = "ops.csv", "ops.md"
PIPELINES, PIPELINES_TABLE, PIPELINES_PLOT = "pipelines.csv", "pipelines.md", "pipelines.png"

#: The templates of the pages.
PAGES = Path(__file__).with_name("pages")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none without the file."""
    return read_csv(path) if path.exists() else []


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    return markdown_table(head, [[str(cell) for cell in line] for line in body])


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def verdicts(rows: list[dict]) -> list[dict]:
    """A line for each op, direction and kernel: who serves eager calls, and our kernel's standing there and in graphs.

    Eager calls go to our kernel if no row of it is more than 5 percent behind the best, else to the plain reference.
    Inside a compiled graph it serves if it is at least `IN_GRAPHS` times as fast in every row.
    """
    decided = []
    for op, direction, backend in dict.fromkeys((row["op"], row["direction"], row["backend"]) for row in rows):
        own = [row for row in rows if (row["op"], row["direction"], row["backend"]) == (op, direction, backend)]
        eager, graph = ([row for row in own if row["style"] == style] for style in STYLES)
        if not eager:  # A time limit left them out.
            continue
        behind, behind_in_graphs = (
            sum(row["verdict"] in ("behind", "wrong") for row in rows) for rows in (eager, graph)
        )
        worst = min(eager, key=lambda row: float(row["ratio"] or 0))
        gains = [float(row["eager_us"]) / float(row["ours_us"]) for row in eager if row["ratio"]]
        decided.append(
            {
                "op": op,
                "direction": direction,
                "eager_calls": "reference" if behind else backend,
                "in_graphs": backend if _ahead(graph) else "reference",
                "behind_eager": f"{behind}/{len(eager)}",
                "behind_graph": f"{behind_in_graphs}/{len(graph)}",
                "gain_on_eager": f"{statistics.geometric_mean(gains) if gains else 0:.2f}",
                "worst_ratio": worst["ratio"],
                "worst_row": " ".join(filter(None, (worst["variant"], worst["shape"], worst["dtype"]))),
            }
        )
    return decided


def _ahead(rows: list[dict]) -> bool:
    """Tell whether a kernel is far enough ahead in all of these rows to block fusion inside a graph.

    This holds only if compilers do not fuse the reference as well, with neighbors that the rows do not have.
    """
    many = REGISTRY[rows[0]["op"]].serves_unraced("graph") if rows and rows[0]["op"] in REGISTRY else ()
    return bool(many) and all(
        float(row["ratio"] or 0) >= IN_GRAPHS and ("" in many or row["variant"] in many) for row in rows
    )


def races(rows: list[dict]) -> dict:
    """The facts that the package ships from rows: who serves each op and variant, and the measuring machine.

    If ops were measured on several machines, the machine with most rows is named.
    """
    usual = statistics.mode(row["device"] for row in rows)
    first = next(row for row in rows if row["device"] == usual)
    kind = "cpu" if first["backend"] == "cpp" else "cuda"
    decided: dict[str, dict] = {}
    for op, direction in dict.fromkeys((row["op"], row["direction"]) for row in rows):
        own = [row for row in rows if (row["op"], row["direction"]) == (op, direction)]
        cells = {"": _winners(own)}
        for variant in dict.fromkeys(row["variant"] for row in own if row["variant"]):
            cells[variant] = _winners([row for row in own if row["variant"] == variant])
        decided[op if direction == "forward" else f"{op}_backward"] = {"cells": cells}
    device, _, capability = first["device"].partition(" x86_64 ")
    capability = f"x86_64 {capability}" if capability else ""
    machine = {"kind": kind, "device": device, "capability": capability, "torch": first["torch"]}
    machine |= {"triton": first["triton"], "threads": first["threads"]}
    return {"machine": machine, "date": max(row["date"] for row in rows), "ops": dict(sorted(decided.items()))}


def _winners(rows: list[dict]) -> dict[str, str]:
    """The backends of eager calls and inside graphs, by rows of one op and direction."""
    (line,) = verdicts(rows)
    return {"eager": line["eager_calls"], "graph": line["in_graphs"]}


def measured_on(rows: list[dict], kind: str) -> str:
    """The machine of the rows; if there are several, the machine of each ``kind``."""
    found: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['device']}, {row['threads']} threads, torch {row['torch']}, triton {row['triton'] or 'absent'}"
        found.setdefault(where, []).append(row[kind])
    if len(found) == 1:
        return f"Measured on {next(iter(found))}."
    parts = (f"{', '.join(dict.fromkeys(names))} on {where}" for where, names in found.items())
    return f"Measured on several machines: {'; '.join(parts)}."


def verdicts_table(rows: list[dict]) -> list[str]:
    """The table of the implementation that runs each op, and of how much faster or slower our kernel is."""
    head = ["op", "direction", "eager calls", "in graphs", "slower, eager", "slower, graph", "gain", "worst ratio"]
    return table([*head, "where"], (line.values() for line in verdicts(rows)))


def markdown(rows: list[dict]) -> str:
    """The page of the ops: the serving kernels, and all rows."""
    gpu = any(f"{AUTOTUNED}_us" in row for row in rows)
    kinds = [*CONTESTANTS[:2], *([AUTOTUNED] if gpu else []), *CONTESTANTS[2:]]
    heads = ["op", "shape", "dtype", "direction", "style", *kinds, "ratio", "GB/s", *(["of a copy"] if gpu else []), ""]
    body = []
    for row in rows:
        cells = [f"{row['op']} {row['variant']}".strip(), row["shape"], row["dtype"], row["direction"], row["style"]]
        # Not every row has an autotuned form; its column is left out if no row has it.
        cells += [row.get(f"{kind}_us") or ("-" if kind == AUTOTUNED else "wrong") for kind in kinds]
        cells += [row["ratio"], row["GB_per_s"], *([row["share_of_copy"] or "-"] if gpu else []), row["verdict"]]
        body.append(cells)
    values = {"rows": rows, "gpu": gpu, "least": LEAST, "in_graphs": IN_GRAPHS, "every_row": table(heads, body)}
    return rendered(PAGES / "ops.md.jinja", (measured_on, verdicts_table), **values)


def report(folder: Path) -> list[Path]:
    """Write the pages of a folder's ops.csv and pipelines.csv beside them, and return the pages.

    Args:
        folder: the folder, which holds at least one of the two files.

    Raises:
        FileNotFoundError: it holds neither.
    """
    pages = []
    for file, page, write in ((ROWS, TABLE, markdown), (PIPELINES, PIPELINES_TABLE, pipelines_markdown)):
        if rows := rows_of(folder / file):
            write_text(folder / page, write(rows))
            pages.append(folder / page)
    if not pages:
        raise FileNotFoundError(f"{folder} holds neither {ROWS} nor {PIPELINES}")
    plot_pipelines(rows, folder / PIPELINES_PLOT)
    return pages


def ops_speedups(path: Path) -> tuple[int, float, float]:
    """The number of eager rows, and the geometric means of the C++ kernels' speedups in them.

    Args:
        path: the rows, ops.csv of a CPU; at least one of them was called from Python.

    Returns:
        The number, and the speedups over the compiler and over the uncompiled reference.
    """
    rows = [row for row in read_csv(path) if row["style"] == "eager" and row["ratio"]]
    compiled, eager = (
        statistics.geometric_mean(float(row[f"{kind}_us"]) / float(row["ours_us"]) for row in rows)
        for kind in ("compile", "eager")
    )
    return len(rows), compiled, eager


def by_case(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The rows of each case of each pipeline."""
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["pipeline"], row["case"]), []).append(row)
    return cases


def pipelines_markdown(rows: list[dict]) -> str:
    """The page of the pipelines."""
    return rendered(PAGES / "pipelines.md.jinja", (measured_on, by_case, parts), rows=rows)


def parts(row: dict) -> list[tuple[str, float]]:
    """The parts of a contestant with their shares of its time."""
    pairs = (part.split(":") for part in row["parts"].split())
    return [(name, float(share)) for name, share in pairs]


def plot_pipelines(rows: list[dict], path: Path) -> bool:
    """Draw speeds relative to the first contestant, with the best torch.compile marked.

    Args:
        rows: rows of pipelines.csv.
        path: the picture's file.

    Returns:
        True if it was drawn; False without rows or without matplotlib.
    """
    cases = {case: [row for row in group if row["ms"]] for case, group in by_case(rows).items()}
    heights = [len(group) + 1.2 for group in cases.values()]
    figure = style.new_figure(figsize=(8.5, 0.25 * sum(heights) + 0.8)) if cases else None
    if figure is None:
        return False
    most = max(float(row["speed_up"]) for group in cases.values() for row in group)
    panels = figure.subplots(len(cases), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for axes, ((pipeline, case), group) in zip(panels[:, 0], cases.items(), strict=True):
        times = [float(row["speed_up"]) for row in group]
        names = [row["contestant"].replace("ours", "purify_fast") for row in group]
        texts = [f"{factor:.2f}   {float(row['ms']):,.0f} ms" for row, factor in zip(group, times, strict=True)]
        style.bars(axes, names, times, [_colour(row["contestant"]) for row in group], texts, most)
        rivals = [factor for row, factor in zip(group, times, strict=True) if "torch.compile" in row["contestant"]]
        if rivals:
            axes.axvline(max(rivals), color=style.RIVAL, linewidth=1.1, linestyle=(0, (4, 3)))
        style.title(axes, f"{pipeline}: {case} ({group[0]['device']})")
    panels[-1, 0].set_xlabel(
        "times as fast as the plain form; dashed: the best torch.compile, the one to beat", fontsize=8.5
    )
    style.save(figure, path)
    return True


def _colour(contestant: str) -> str:
    if contestant.startswith("ours"):
        return style.OURS
    return style.RIVAL if "torch.compile" in contestant else style.PLAIN
