"""Make tables from the CSV files.

A row of ops.csv is the measurement of an op with a shape, a dtype, a direction and a style of calls (`timing` explains
the styles). A row of pipelines.csv is the measurement of an implementation of a pipeline, called a contestant.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from purify_fast._files import write_text
from purify_fast.judge.show.text import markdown_table
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch.choices import in_words
from purify_fast.ops.dispatch.op import BACKENDS

from ..kept import machines
from ..prose import rendered
from .timing import CONTESTANTS, STYLES

ROWS, TABLE = "ops.csv", "ops.md"
PIPELINES, PIPELINES_TABLE = "pipelines.csv", "pipelines.md"
#: The results on a CPU that has AVX2 alone.
PIPELINES_AVX2 = "pipelines_avx2.csv"

#: The beginnings of the names of the expert's forms, and of those of this package.
EXPERT, OURS = "expert", "ours"

#: The folder with the templates of the pages.
PAGES = Path(__file__).with_name("pages")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or an empty list if there is no file."""
    return read_csv(path) if path.exists() else []


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return markdown_table(head, [[str(cell) for cell in line] for line in body])


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def verdicts(rows: list[dict]) -> list[dict]:
    """Return a line for each op, direction and kernel: the flags of the op, and how often the kernel was slower."""
    lines = []
    for op, direction, backend in dict.fromkeys((row["op"], row["direction"], row["backend"]) for row in rows):
        own = [row for row in rows if (row["op"], row["direction"], row["backend"]) == (op, direction, backend)]
        eager, graph = ([row for row in own if row["style"] == style] for style in STYLES)
        lost, lost_in_graphs = (sum(row["verdict"] in ("behind", "wrong") for row in each) for each in (eager, graph))
        worst = min(eager, key=lambda row: float(row["ratio"] or 0))
        gains = [float(row["eager_us"]) / float(row["ours_us"]) for row in eager if row["ratio"]]
        known = REGISTRY[op if direction == "forward" else f"{op}_{direction}"]
        (kind,) = BACKENDS[backend]
        lines.append(
            {
                "op": op,
                "direction": direction,
                "eager_calls": in_words(known, backend, known.smallest[kind]),
                "in_graphs": in_words(known, backend, dict.fromkeys(known.in_graphs.get(kind, ()), 0)),
                "behind_eager": f"{lost}/{len(eager)}",
                "behind_graph": f"{lost_in_graphs}/{len(graph)}",
                "gain_on_eager": f"{statistics.geometric_mean(gains) if gains else 0:.2f}",
                "worst_ratio": worst["ratio"],
                "worst_row": " ".join(filter(None, (worst["variant"], worst["shape"], worst["dtype"]))),
            }
        )
    return lines


def measured_on(rows: list[dict], kind: str) -> str:
    """Return a sentence about the machine on which rows were measured."""
    found: dict[str, list[str]] = {}
    for row in rows:
        where = f"{machines([row])}, torch {row['torch']}, triton {row['triton'] or 'absent'}"
        found.setdefault(where, []).append(row[kind])
    if len(found) == 1:
        return f"Measured on {next(iter(found))}."
    parts = (f"{', '.join(dict.fromkeys(names))} on {where}" for where, names in found.items())
    return f"Measured on several machines: {'; '.join(parts)}."


def verdicts_table(rows: list[dict]) -> list[str]:
    """Return the table with the implementation that runs by default for each op, and with the speed of our kernel."""
    head = ["op", "direction", "eager calls", "in graphs", "slower, eager", "slower, graph", "gain", "worst ratio"]
    return table([*head, "where"], (line.values() for line in verdicts(rows)))


def markdown(rows: list[dict]) -> str:
    """Return the page of the ops, with the default implementations and all rows."""
    heads = ["op", "shape", "dtype", "direction", "style", *CONTESTANTS, "ratio", "GB/s", ""]
    body = []
    for row in rows:
        cells = [f"{row['op']} {row['variant']}".strip(), row["shape"], row["dtype"], row["direction"], row["style"]]
        cells += [row[f"{kind}_us"] or "wrong" for kind in CONTESTANTS]
        cells += [row["ratio"], row["GB_per_s"], row["verdict"]]
        body.append(cells)
    values = {"rows": rows, "every_row": table(heads, body)}
    return rendered(PAGES / "ops.md.jinja", (measured_on, verdicts_table), **values)


def report(folder: Path) -> None:
    """Write the pages of ops.csv and pipelines.csv into the folder of these files."""
    if ops := rows_of(folder / ROWS):
        write_text(folder / TABLE, markdown(ops))
    if raced := rows_of(folder / PIPELINES):
        write_text(folder / PIPELINES_TABLE, pipelines_markdown(raced))


def by_case(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Return the rows of each race, by the names of pipeline and case, and by the number of threads of the host."""
    cases: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["pipeline"], row["case"], row["threads"]), []).append(row)
    return cases


def fewest_threads(rows: list[dict]) -> list[dict]:
    """Return the rows of the race with the fewest threads for each case, and drop the rows of its other races."""
    least: dict[tuple[str, str], int] = {}
    for pipeline, case, threads in by_case(rows):
        least[pipeline, case] = min(int(threads), least.get((pipeline, case), int(threads)))
    return [row for row in rows if int(row["threads"]) == least[row["pipeline"], row["case"]]]


def fastest(rows: Iterable[Mapping[str, str]], kind: str, column: str = "contestant") -> float | None:
    """Return the milliseconds of the fastest form of a kind, or None if no such form has a time."""
    return min((float(row["ms"]) for row in rows if row[column].startswith(kind) and row["ms"]), default=None)


def times_the_expert(row: Mapping[str, str], group: list[dict]) -> str:
    """Return how many times a row is as fast as the expert's fastest form in its group, or an empty text."""
    expert = fastest(group, EXPERT)
    return f"{expert / float(row['ms']):.2f}" if expert and row["ms"] else ""


def pipelines_markdown(rows: list[dict]) -> str:
    """Return the page of the pipelines."""
    return rendered(PAGES / "pipelines.md.jinja", (measured_on, by_case, times_the_expert), rows=rows)
