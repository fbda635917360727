"""The tables of a report: their contents, and their forms in Markdown and on a terminal."""

from __future__ import annotations

import itertools
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from ..alarms.evidence import Finding
from ..results.rows import Row

UNRELIABLE = "unreliable"
#: The mark of an unreliable number in Markdown.
RED_UNRELIABLE = f'**<span style="color:red">{UNRELIABLE}</span>**'
#: The longest line of a table on a terminal, in characters.
TERMINAL = 100
#: The smallest width to which a column on a terminal is wrapped, in characters.
NARROWEST = 12


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with remarks after its main text."""

    text: str = ""
    remarks: tuple[str, ...] = ()
    unreliable: bool = False
    red: bool = False

    def written(self, unreliable: str = UNRELIABLE) -> str:
        """The cell as text; ``unreliable`` is the word or mark for an unreliable number."""
        remarks = ", ".join([*self.remarks, *([unreliable] if self.unreliable else [])])
        return f"{self.text} {remarks}".strip()

    def __str__(self) -> str:
        return self.written()


class Table(NamedTuple):
    """A table; every line of the body has the same number of cells as the head."""

    head: Sequence[str]
    body: Sequence[Sequence[str | Cell]]


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str | Cell]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(_in_markdown(cell) for cell in line) + " |" for line in lines]


def _in_markdown(cell: str | Cell) -> str:
    """Escape a cell for Markdown, in which a bar would end the column, and ``<lambda>`` would be a tag."""
    text = cell if isinstance(cell, str) else cell.written(RED_UNRELIABLE)
    return text.replace("|", "\\|").replace("<lambda>", "&lt;lambda&gt;")


def terminal_table(
    head: Sequence[str], body: Iterable[Sequence[str | Cell]], color: bool, longest: float = math.inf
) -> str:
    """A table as text with columns of fixed width."""
    table = [list(head), *body]
    width = [max(1, *(len(str(line[i])) for line in table)) for i in range(len(head))]
    while _length(width) > longest and max(width) > NARROWEST:
        width[width.index(max(width))] -= 1
    blocks = [_wrapped(line, width, color) for line in table]
    return "\n".join([*blocks[0], "-" * _length(width), *(line for block in blocks[1:] for line in block)])


def _wrapped(cells: Sequence[str | Cell], width: Sequence[int], color: bool) -> list[str]:
    """The lines of text for one line of a table, whose cells are wrapped to the widths of their columns."""
    red = [color and isinstance(cell, Cell) and cell.red for cell in cells]
    parts = [textwrap.wrap(str(cell), w, break_on_hyphens=False) for cell, w in zip(cells, width, strict=True)]
    return [
        "  ".join(
            paint(text.ljust(w), "red", alarming and bool(text))
            for text, w, alarming in zip(part, width, red, strict=True)
        ).rstrip()
        for part in itertools.zip_longest(*parts, fillvalue="")
    ]


def _length(widths: Sequence[int]) -> int:
    """The length of a line with columns of these widths."""
    return sum(widths) + 2 * (len(widths) - 1)


def paint(text: str, color: Literal["red", "green"], wanted: bool) -> str:
    """Color a text for a terminal if ``wanted`` is True."""
    return f"\033[{31 if color == 'red' else 32}m{text}\033[0m" if wanted else text


def color_is_welcome() -> bool:
    """Tell whether standard output is a terminal, and NO_COLOR (https://no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def percent(row: Row) -> str:
    """A row's accuracy and standard error, in percent."""
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"


def single_predictions(row: Row) -> str:
    """The share of correct single predictions in percent; of several draws also its standard error."""
    share = f"{100 * row.mean:.1f}"
    return share if row.right is None else f"{share} ± {100 * row.mean_error:.1f}"


def warning(row: Row) -> Cell:
    """The warning about a row's accuracy; empty for most rows."""
    broken = [f"{row.nonfinite_predictions} predictions not finite"] if row.nonfinite_predictions else []
    remarks = (*broken, *(["nothing to attack"] if row.nothing_to_attack else []))
    return Cell("", remarks, unreliable=not row.reliable, red=bool(broken) or not row.reliable)


#: The columns of the table of all rows. The function of a column makes the cell of a row.
_CELLS: dict[str, Callable[[Row], str | Cell]] = {
    "model": lambda row: row.model,
    "attack": lambda row: row.attack,
    "variant": lambda row: row.describe_variant(),
    "EOT": lambda row: str(row.settings.get("eot_iter", "-")),
    # An attack on survivors also has the number of images that it got.
    "n": lambda row: f"{row.n} ({row.attacked})" if row.of_survivors else str(row.n),
    "accuracy": percent,
    "one draw": single_predictions,
    "draws": lambda row: str(row.n_eval),
    "gradients": lambda row: row.describe_health(),
    "": lambda row: warning(row),
    "seed": lambda row: str(row.seed),
    "s": lambda row: f"{row.seconds:.1f}",
}
COLUMNS = [*_CELLS]


def table_of_rows(rows: Sequence[Row], columns: Iterable[str] = COLUMNS) -> Table:
    """A table with a line for each row."""
    return Table([*columns], [[_CELLS[name](row) for name in columns] for row in rows])


def short_table(rows: Sequence[Row]) -> Table:
    """The table of one model's rows for a terminal, without columns that have the same text in all rows."""
    used = {"attack", "n", "accuracy", "gradients", ""}
    used |= {"variant"} if any(not row.deployed for row in rows) else set()
    used |= {"one draw"} if any(row.n_eval > 1 for row in rows) else set()
    head, body = table_of_rows(rows, [name for name in COLUMNS if name in used])
    return Table(["images" if name == "n" else name for name in head], body)


def comparison(report: Any) -> Table:
    """A table with a line for each attack of a `purify_fast.evaluation.Report`, and a column for each model."""
    by_name = {(row.attack, row.model): row for row in report.rows}

    def cell(attack: str, model: str) -> str | Cell:
        row = by_name.get((attack, model))
        return "-" if row is None else replace(warning(row), text=percent(row))

    body = [[attack, *(cell(attack, model) for model in report.models)] for attack in report.attacks]
    return Table(["attack", *report.models], body)


def table_of_findings(findings: Sequence[Finding]) -> Table:
    """The table of the alarms' findings, with the advice if a finding is "unreliable"."""
    body: list[list[str | Cell]] = []
    for finding in findings:
        doubt = finding.verdict == "unreliable"
        verdict = Cell("", (), unreliable=True, red=True) if doubt else finding.verdict
        measured = f"{finding.measured}. What to do: {finding.advice}" if finding.advice else finding.measured
        body.append([finding.model, finding.alarm, verdict, measured, finding.row or "-"])
    return Table(["model", "sign", "verdict", "measured", "shown by"], body)
