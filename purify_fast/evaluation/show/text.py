"""The sentences of a report: the templates beside this file hold them, and call these functions."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..alarms import STATES, Finding
from ..alarms.signs import ALARMS
from ..claims import answer
from ..rows import Row, followed
from .tables import (
    COLUMNS,
    RED_UNRELIABLE,
    TERMINAL,
    comparison,
    markdown_table,
    paint,
    percent,
    short_table,
    table_of_findings,
    table_of_rows,
    terminal_table,
    warning,
)

if TYPE_CHECKING:
    import jinja2

#: `purify_fast.evaluation.Report`, which uses this module.
Report = Any

_WITH = {"fixed": "fixed noise", "deterministic": "its noise off"}


def render(template: str, **values: Any) -> str:
    """Render a template of this folder with these values; in HTML every text is escaped.

    Args:
        template: the file's name.
        values: its variables, besides the functions and words that all templates may use.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    # Its import takes as long as that of this whole folder.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("purify_fast.evaluation", "show"),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    functions = (
        *(about_variants, claim, column_legend, comparison, facts, fill, followed, markdown_table, not_asked, outcome),
        *(paint, percent, reason, settings_told, short_legend, short_table, table_of_findings, table_of_rows),
        *(terminal_table, told_beside, warning, without_probes),
    )
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"columns": COLUMNS, "mark": RED_UNRELIABLE, "meanings": STATES, "terminal": TERMINAL}
    return environment


def fill(text: str, mark: str = "") -> str:
    """Wrap a text to a terminal's width, with a mark before the first line and equal space before the others."""
    indent = " " * len(mark)
    return textwrap.fill(text, TERMINAL, initial_indent=mark, subsequent_indent=indent, break_on_hyphens=False)


def short_legend(rows: Sequence[Row]) -> str:
    """A line that explains the columns on a terminal."""
    several = max((row.n_eval for row in rows), default=1)
    right = f"right in all {several} draws" if several > 1 else "right"
    authors = any(row.kind == "authors" for row in rows)
    others = 'rows named "as ..." repeat an evaluation of others; ' if authors else ""
    return f"accuracy: % {right}; gradients: % not finite / zero / images unmoved; {others}more: the saved report.md"


def facts(report: Report) -> list[tuple[str, str]]:
    """The known facts for repeating a report, by name."""
    images = ", ".join(dict.fromkeys(f"{row.n:,}" for row in report.rows if row.kind == "clean"))
    named = {name: report.about.get(name, "") for name in ("date", "command", "call")}
    named |= {"images": images, "seed": report.about.get("seed", "")}
    named |= {name: report.about.get(name, "") for name in ("model", "processor", "claim")}
    words = {"call": "call in Python", "model": "hash of the model", "claim": "claimed, %"}
    return [(words.get(name, name), value) for name, value in named.items() if value]


# -- the headline -----------------------------------------------------------------------------------------------------


def outcome(report: Report, row: Row) -> str:
    """The words after a row's percent sign, and the accuracy without an attack by the same criterion."""
    text = f"of {row.n} image{' is' if row.n == 1 else 's are'} still classified correctly"
    several = row.n_eval > 1
    if several:
        text += f" in all {row.n_eval} draws"
    if row.kind != "worst":
        text += f" under {row.attack}"
    else:
        count = len(row.settings.get("over", report.attacks_like(row)))
        text += " after the attack" if count == 1 else f" after all {count} attacks"
        text += " and the probes" if row.fell_to_probes is not None else ""
    threat = row.threat or report.threats.get(row.model, report.about.get("threat"))
    text += f" within {threat}" if threat else ""
    single = report.one_draw(row)
    if single is not None:
        text += f" ({100 * single:.1f} % in one draw)"
    clean = next((each for each in report.rows if each.model == row.model and each.kind == "clean"), None)
    if clean is None:
        return text
    if clean.n_eval == 1:
        return f"{text}; without an attack, {100 * clean.accuracy:.1f} %"
    both = f"{100 * clean.always_right:.1f} % (all {clean.n_eval} draws), {100 * clean.mean:.1f} % (one draw)"
    return f"{text}; without an attack, {both}"


def claim(report: Report, row: Row) -> str:
    """The sentence on whether a report's lowest row refutes the claim; empty without a claim."""
    return answer(float(report.about["claim"]), row) if "claim" in report.about else ""


def reason(report: Report, row: Row) -> str:
    """The reason why a row is unreliable; empty if a sign gives the reason or the row is reliable."""
    told = any((finding.model, finding.verdict) == (row.model, "unreliable") for finding in report.findings)
    if row.reliable or row.doubts or told:
        return ""
    counted = [each for each in report.attacks_like(row) if each.health is not None and each.own_gradients]
    if not counted:
        return "no attack whose gradients are counted was run: add PGD() to the attacks, or give probes=True"
    shares = "; ".join(f"{each.attack}: {each.describe_health()}" for each in counted)
    return f"gradients not finite / zero / images not moved: {shares}"


def told_beside(findings: Sequence[Finding]) -> list[Finding]:
    """The alarms that a reader of the lowest number must know; doubts first."""
    return sorted((finding for finding in findings if finding.beside_headline), key=lambda f: f.verdict != "unreliable")


def without_probes(findings: Sequence[Finding]) -> bool:
    """Tell whether no sign was asked that needs probes."""
    asked = {finding.alarm for finding in findings}
    return not any(name in asked for name, _, of_probes, _ in ALARMS if of_probes)


def not_asked(findings: Sequence[Finding]) -> list[str]:
    """The names of the signs that were not asked; without probes, all that need them are among these."""
    absent = [name for name, _, of_probes, _ in ALARMS if of_probes] if without_probes(findings) else []
    return [finding.alarm for finding in findings if finding.verdict == "not asked"] + absent


# -- the tables -------------------------------------------------------------------------------------------------------


def column_legend(rows: Sequence[Row]) -> list[str]:
    """A paragraph for each column of the table of all rows; columns that no row uses are not explained."""
    early = dict.fromkeys(row.attack for row in rows if row.may_end_early)
    published = dict.fromkeys((row.attack, row.n_eval) for row in rows if row.settings.get("published"))
    told = {"early": list(early), "published": list(published)}
    text = render("columns.jinja", rows=rows, **told)
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def settings_told(row: Row) -> dict[str, Any]:
    """A row's settings and results for the reader, with the word for the judged model in place of the internal ones."""
    shown = row.settings | row.results()
    return shown | ({"variant": row.describe_variant()} if "variant" in shown else {})


def about_variants(rows: Sequence[Row]) -> list[str]:
    """Sentences on the lowest number of each variant of a model, to stand beside that of the deployed model."""
    apart = [row for row in rows if (row.is_attack or row.kind == "worst") and not (row.threat or row.deployed)]
    lowest = [
        min((row for row in apart if row.variant == variant), key=lambda row: (row.accuracy, row.kind != "worst"))
        for variant in dict.fromkeys(row.variant for row in apart)
    ]
    return [
        f"With {_WITH[row.variant]}, which is not the model as it is deployed: {percent(row)} % ({row.attack})."
        for row in lowest
    ]
