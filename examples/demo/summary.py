"""Cells of the summary tables, and the templates of this folder."""

from __future__ import annotations

from pathlib import Path

import jinja2

from purify_fast.evaluation import Report, Row

#: With fewer images than this, the standard error of an accuracy may be above five percentage points.
FEW = 100


def template(name: str) -> jinja2.Template:
    """Read a template of this folder. A name that it lacks is an error when it is filled."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=folder, undefined=jinja2.StrictUndefined, trim_blocks=True).get_template(name)


def percent(row: Row) -> str:
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"


def signs(report: Report) -> str:
    """A text that names the signs of failed attacks on a model, or says that there are none."""
    lowest = report.headline
    if not lowest.reliable:
        return "**ALARM**: the attack lacked gradients"
    found = [finding for finding in report.findings if finding.beside_headline]
    doubts = [finding.alarm for finding in found if finding.verdict == "unreliable"]
    if doubts:
        return f"**ALARM**: {', '.join(doubts)}"
    words = ["none"] if lowest.n >= FEW else [f"none on {lowest.n} images, which are few"]
    return "; ".join([*words, *(f"fails *{finding.alarm}*" for finding in found)])


def side_by_side(reports: list[Report]) -> str:
    """A Markdown table with a line for each attack and a column for each model."""
    columns = [{row.attack: row for row in report.rows} for report in reports]
    attacks = dict.fromkeys(attack for report in reports for attack in report.attacks)
    # The worst of all attacks stands below them.
    ordered = sorted(attacks, key=lambda attack: attack.startswith("worst"))
    head = ["attack, accuracy in %", *(report.model for report in reports)]
    lines = [[attack, *(_cell(column.get(attack)) for column in columns)] for attack in ordered]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return percent(row) if row.reliable else f"{percent(row)} **unreliable**"
