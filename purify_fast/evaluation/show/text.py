"""Renders the templates of this folder, which contain a report's sentences, and defines the functions they call."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ... import _templates
from ..alarms.evidence import STATES, Finding
from ..alarms.signs import ALARMS
from ..results.claims import MOST, REFUTED
from ..results.rows import Row, followed
from . import tables
from .tables import TERMINAL, percent

if TYPE_CHECKING:
    import jinja2

#: The type `purify_fast.evaluation.Report`, which cannot be imported here, because its module imports this module.
Report = Any

#: The macros of `sentences.jinja` that all templates may call; in HTML their texts are escaped.
SENTENCES = ("claim", "means", "outcome", "reason", "short_legend", "signs", "states", "verdict", "zero_errors")
_WITH = {"fixed": "fixed noise", "deterministic": "its noise off"}


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; in HTML every text is escaped."""
    return _environment().get_template(template).render(values)


def sentence(name: str, *values: Any) -> str:
    """The text of a macro of `sentences.jinja`, in a single line."""
    macro = getattr(_environment().get_template("sentences.jinja").module, name)
    return " ".join(macro(*values).split())


@functools.cache
def _environment() -> jinja2.Environment:
    environment = _templates.environment(__package__)
    functions = [about_variants, column_legend, facts, fill, followed, not_asked]
    functions += [settings_told, told_beside, without_probes]
    # Templates may also use all names of the tables.
    environment.globals |= vars(tables) | {function.__name__: function for function in functions}
    environment.globals |= {name: functools.partial(sentence, name) for name in SENTENCES}
    environment.globals |= {"MOST": MOST, "REFUTED": REFUTED, "STATES": STATES}
    return environment


def fill(text: str, mark: str = "") -> str:
    """Wrap a text to a terminal's width; ``mark`` stands before the first line, and the other lines are indented."""
    indent = " " * len(mark)
    return textwrap.fill(text, TERMINAL, initial_indent=mark, subsequent_indent=indent, break_on_hyphens=False)


def facts(report: Report) -> list[tuple[str, str]]:
    """The known facts that are needed to repeat an evaluation, by name."""
    images = ", ".join(dict.fromkeys(f"{row.n:,}" for row in report.rows if row.kind == "clean"))
    known = report.about | {"images": images}
    words = {"model": "hash of the model", "claim": "claimed, %", "peak_memory": "memory at the peak"}
    names = ("date", "command", "images", "seed", "model", "processor", "seconds", "peak_memory", "claim")
    return [(words.get(name, name), known[name]) for name in names if known.get(name)]


# -- the headline -----------------------------------------------------------------------------------------------------


def told_beside(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that stand next to the headline; "unreliable" comes first."""
    return sorted((finding for finding in findings if finding.beside_headline), key=lambda f: f.verdict != "unreliable")


def without_probes(findings: Sequence[Finding]) -> bool:
    """Tell whether there were no probes, so that the alarms that need probes did not run."""
    asked = {finding.alarm for finding in findings}
    return not any(alarm.name in asked for alarm in ALARMS if alarm.of_probes)


def not_asked(findings: Sequence[Finding]) -> list[str]:
    """The names of the alarms with the verdict "not asked"; without probes, all alarms that need probes are added."""
    absent = [alarm.name for alarm in ALARMS if alarm.of_probes] if without_probes(findings) else []
    return [finding.alarm for finding in findings if finding.verdict == "not asked"] + absent


# -- the tables -------------------------------------------------------------------------------------------------------


def column_legend(rows: Sequence[Row]) -> list[str]:
    """The paragraphs that explain the table of all rows; a paragraph is left out if it concerns no row."""
    early = dict.fromkeys(row.attack for row in rows if row.may_end_early)
    published = dict.fromkeys((row.attack, row.n_eval) for row in rows if row.settings.get("published"))
    told = {"early": list(early), "published": list(published)}
    text = render("columns.jinja", rows=rows, **told)
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def settings_told(row: Row) -> dict[str, Any]:
    """A row's settings and results for the reader, with the report's word for the variant of the model."""
    shown = row.settings | row.results()
    return shown | ({"variant": row.describe_variant()} if "variant" in shown else {})


def about_variants(rows: Sequence[Row]) -> list[str]:
    """Return, for each variant of a random model with fixed or no noise, a sentence on the lowest accuracy."""
    apart = [row for row in rows if (row.is_attack or row.kind == "worst") and not (row.threat or row.deployed)]
    lowest = [
        min((row for row in apart if row.variant == variant), key=lambda row: (row.accuracy, row.kind != "worst"))
        for variant in dict.fromkeys(row.variant for row in apart)
    ]
    return [
        f"With {_WITH[row.variant]}, which is not the model as it is deployed: {percent(row)} % ({row.attack})."
        for row in lowest
    ]
