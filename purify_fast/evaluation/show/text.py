"""What a report says in sentences: the templates beside this file hold them, and here is what they ask."""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jinja2

from ...attacks.engine.rows import FEWEST_STEPS
from ...attacks.square import GIVEN_UP_AFTER
from ..alarms import STATES, Finding
from ..rows import Row
from .tables import (
    COLUMNS,
    RED_UNRELIABLE,
    comparison,
    markdown_table,
    percent,
    table_of_findings,
    table_of_rows,
    terminal_table,
    warning,
)

_WITH = {"fixed": "fixed noise", "deterministic": "its noise off"}


def render(template: str, **values: Any) -> str:
    """A template of this folder with these values; in HTML every text is escaped.

    Args:
        template: the file's name.
        values: what it names, beside the functions and words that all templates may use.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("purify_fast.evaluation", "show"),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    functions = (
        about_variants, beside_headline, column_legend, comparison, markdown_table, percent, table_of_findings,
        table_of_rows, terminal_table, warning,
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions}
    # lines of a terminal's usual width
    environment.globals["fill"] = functools.partial(textwrap.fill, width=120, break_on_hyphens=False)
    environment.globals |= {"columns": COLUMNS, "mark": RED_UNRELIABLE, "meanings": STATES}
    return environment


def column_legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of a table of all rows mean, a paragraph each; what no row has is not explained."""
    early = dict.fromkeys(row.attack for row in rows if _may_end_early(row))
    published = dict.fromkeys((row.attack, row.n_eval) for row in rows if row.settings.get("published"))
    nearest = Counter[str]()
    for row in rows:
        if "unsearched" in row.settings:
            nearest[row.attack] += row.settings["unsearched"]
    told = {"early": list(early), "nearest": list(nearest.items()), "published": list(published)}
    text = render("columns.jinja", rows=rows, **told)
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def _may_end_early(row: Row) -> bool:
    """Whether a search of a row may have ended early, by the row's settings."""
    settings = row.settings
    if not settings.get("give_up"):
        return False
    if row.kind == "square":
        return settings["n_queries"] > GIVEN_UP_AFTER[0] and settings["eot_iter"] == 1
    return settings["steps"] >= FEWEST_STEPS and (row.kind, settings["norm"]) != ("apgd", "l1")


def about_variants(rows: Sequence[Row]) -> list[str]:
    """The lowest number of each variant of a model, in sentences: they stand beside the number of the deployed one."""
    apart = [row for row in rows if (row.is_attack or row.kind == "worst") and not (row.threat or row.deployed)]
    lowest = [
        min((row for row in apart if row.variant == variant), key=lambda row: (row.accuracy, row.kind != "worst"))
        for variant in dict.fromkeys(row.variant for row in apart)
    ]
    return [
        f"With {_WITH[row.variant]}, which is not the model as it is deployed: {percent(row)} % ({row.attack})."
        for row in lowest
    ]


def beside_headline(findings: Sequence[Finding]) -> list[str]:
    """What a reader of the lowest number must know of the alarms, with the row that tells; doubts first."""
    told = sorted((finding for finding in findings if finding.beside_headline), key=lambda f: f.verdict != "unreliable")
    return [f"{finding.alarm}: {finding.measured}" + (f" ({finding.row})" if finding.row else "") for finding in told]
