"""The text of a report: tables in Markdown and for a terminal, and the templates of this folder with its sentences."""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ... import _files
from ...attacks import frozen
from ...protocols import Classifier, FixedNoise, SampleLogits, supports
from ..alarms.probes import PROBED
from ..alarms.signs import ALARMS, STATES, Evidence, Finding
from ..estimates import REFUTED, in_percent
from ..request.deadline import device_of
from ..results.rows import CUT, Examples, Row

if TYPE_CHECKING:
    import jinja2

#: The type `purify_fast.evaluation.Report`, which cannot be imported here, because its module imports this module.
Report = Any

#: The macros of `sentences.jinja` that all templates may call; in HTML their texts are escaped.
SENTENCES = ("claim", "means", "outcome", "reason", "short_legend", "signs", "states", "verdict")
UNRELIABLE = "unreliable"
#: The mark of an unreliable number in Markdown.
RED_UNRELIABLE = f'**<span style="color:red">{UNRELIABLE}</span>**'
#: The longest line of a table on a terminal, in characters.
TERMINAL = 100
#: The length of the hash of the images, in characters.
SHORT = 12
#: The smallest width to which a column on a terminal is wrapped, in characters.
NARROWEST = 12


#: The head and the lines of a table; every line has the same number of cells as the head.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(map(in_markdown, line)) + " |" for line in (head, ["---"] * len(head), *body)]


def latex_table(lines: Sequence[Mapping[str, str]]) -> str:
    """A table in LaTeX for the package booktabs, of lines with the same columns."""
    cells = [[*lines[0]], *([*line.values()] for line in lines)]
    rows = [" & ".join(re.sub(r"([%&#_$])", r"\\\1", cell) for cell in row) + r" \\" for row in cells]
    head = rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}"
    return "\n".join([head, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"])


def in_markdown(cell: str) -> str:
    """Escape a cell for Markdown, in which a bar would end the column, and ``<lambda>`` would be a tag.

    The word "unreliable" at the end becomes red.
    """
    if cell.endswith(UNRELIABLE):
        cell = cell.removesuffix(UNRELIABLE) + RED_UNRELIABLE
    return cell.replace("|", "\\|").replace("<lambda>", "&lt;lambda&gt;")


def terminal_table(head: Sequence[str], body: Iterable[Sequence[str]], longest: float = math.inf) -> str:
    """A table as text with columns of fixed width; wide columns are wrapped until a line has ``longest`` characters."""
    table, lines = [head, *body], list[str]()
    width = [max(1, *map(len, column)) for column in zip(*table, strict=True)]
    while sum(width) + 2 * (len(width) - 1) > longest and max(width) > NARROWEST:
        width[width.index(max(width))] -= 1
    for cells in table:
        parts = [textwrap.wrap(cell, w, break_on_hyphens=False) for cell, w in zip(cells, width, strict=True)]
        for texts in itertools.zip_longest(*parts, fillvalue=""):
            lines.append("  ".join(text.ljust(w) for text, w in zip(texts, width, strict=True)).rstrip())
        if cells is table[0]:
            lines.append("-" * (sum(width) + 2 * (len(width) - 1)))
    return "\n".join(lines)


def single_predictions(row: Row) -> str:
    """The share of correct single predictions in percent; of several draws also its interval."""
    return in_percent(row.mean, None if row.n_eval == 1 else row.mean_interval)


def warning(row: Row) -> str:
    """The warning about a row's accuracy; empty for most rows."""
    broken = f"{row.nonfinite_predictions} predictions not finite" if row.nonfinite_predictions else ""
    nothing = "nothing to attack" if row.nothing_to_attack else ""
    return ", ".join(filter(None, [broken, nothing, UNRELIABLE if doubtful(row) else ""]))


def doubtful(row: Row) -> bool:
    """Return True if a row is unreliable. An accuracy of 0 % cannot be too high, so then only a sign makes it so."""
    return not row.reliable and (row.accuracy > 0 or bool(row.doubts))


#: The columns of the table of all rows. The function of a column makes the cell of a row.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "attack": lambda row: row.attack,
    "EOT": lambda row: str(row.settings.get("eot_iter", "-")),
    # An attack on survivors also has the number of images that it searched.
    "n": lambda row: f"{row.n} ({(row.attacked or 0) - row.unsearched})" if row.of_survivors else str(row.n),
    "accuracy": lambda row: row.in_percent,
    "one draw": single_predictions,
    "draws": lambda row: str(row.n_eval),
    "gradients": Row.describe_health,
    "": warning,
    "seed": lambda row: str(row.seed),
    "s": lambda row: f"{row.seconds:.1f}",
}


def table_of_rows(rows: Sequence[Row], columns: Iterable[str] = COLUMNS) -> Table:
    """A table with a line for each row; the column of the accuracy of a random model names its rule."""
    names = [*columns]
    head = [accuracy_named(rows) if name == "accuracy" else name for name in names]
    return head, [[COLUMNS[name](row) for name in names] for row in rows]


def accuracy_named(rows: Sequence[Row]) -> str:
    """The name of the column of accuracies: that of a random model counts images that are right in all draws."""
    return "all draws" if any(row.n_eval > 1 for row in rows) else "accuracy"


def short_table(rows: Sequence[Row]) -> Table:
    """The table of one model's rows for a terminal, without columns that have the same text in all rows."""
    drawn = ["one draw"] if any(row.n_eval > 1 for row in rows) else []
    head, body = table_of_rows(rows, ["attack", "n", "accuracy", *drawn, "gradients", ""])
    return ["images" if name == "n" else name for name in head], body


def page_table(rows: Sequence[Row]) -> tuple[Table, list[str]]:
    """The table of a page, without the columns that have the same text in all rows, and the texts of these columns."""
    drawn = any(row.n_eval > 1 for row in rows)
    head, body = table_of_rows(rows, [name for name in COLUMNS if name != "model" and (drawn or name != "one draw")])
    texts = {name: {*cells} for name, cells in zip(head, zip(*body, strict=True), strict=True)}
    alike = [name for name in head if len(rows) > 1 and len(texts[name]) == 1 and name != "attack"]
    kept = [place for place, name in enumerate(head) if name not in alike]
    same = [f"{name} {text}" for name in alike for text in texts[name] - {"", "-"}]
    return ([head[place] for place in kept], [[cells[place] for place in kept] for cells in body]), same


def advised_once(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, each without those clauses of its advice that an earlier finding gives."""
    earlier, once = set[str](), list[Finding]()
    for finding in findings:
        clauses = [clause for clause in finding.advice.split("; ") if clause not in earlier]
        earlier.update(clauses)
        once.append(replace(finding, advice="; ".join(clauses)))
    return once


def table_of_findings(findings: Sequence[Finding], advised: bool = True) -> Table:
    """The table of the alarms' findings, with the advice; not ``advised``: without advice beside the headline."""
    body = []
    for finding in findings:
        advice = finding.advice if advised or not finding.beside_headline else ""
        measured = finding.measured + (f". What to do: {advice}" if advice else "")
        body.append([finding.model, finding.alarm, finding.verdict, measured, finding.row or "-"])
    return ["model", "sign", "verdict", "measured", "shown by"], body


# -- templates --------------------------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; in HTML every text is escaped."""
    return _environment().get_template(template).render(values)


def sentence(name: str, *values: Any) -> str:
    """The text of a macro of `sentences.jinja`, in a single line."""
    macro = getattr(_environment().get_template("sentences.jinja").module, name)
    return " ".join(macro(*values).split())


@functools.cache
def _environment() -> jinja2.Environment:
    environment = _files.environment(__package__)
    # Templates may use all names of this module. Three of them are used only there, so they are listed.
    environment.globals |= globals() | {"REFUTED": REFUTED, "STATES": STATES}
    environment.globals |= {name: functools.partial(sentence, name) for name in SENTENCES}
    return environment


def fill(text: str, start: str = "") -> str:
    """Wrap a text to a terminal's width; ``start`` stands before the first line, and the other lines are indented."""
    indent = " " * len(start)
    return textwrap.fill(text, TERMINAL, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def facts(report: Report) -> list[tuple[str, str]]:
    """The known facts that are needed to repeat an evaluation, by name."""
    of = f" of {report.about['dataset']}" if "dataset" in report.about else ""
    clean = (row for row in report.rows if row.kind == "clean")
    images = "; ".join(dict.fromkeys(f"{row.n:,}{of}, hash {row.data[:SHORT]}" for row in clean))
    values = report.about | {"images": images}
    names = "date command images seed model processor gradients captured passes seconds peak_memory claim"
    words = {"model": "hash of the weights", "claim": "claimed, %", "peak_memory": "memory at the peak"}
    words["captured"] = "CUDA graphs"
    return [(words.get(name, name), values[name]) for name in names.split() if values.get(name)]


# -- the headline -----------------------------------------------------------------------------------------------------


def findings_beside_headline(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that stand next to the headline; "unreliable" comes first."""
    return sorted((finding for finding in findings if finding.beside_headline), key=lambda f: f.verdict != "unreliable")


def without_probes(findings: Sequence[Finding]) -> bool:
    """Return True if there were no probes, so that the alarms that need probes did not run."""
    names = {finding.alarm for finding in findings}
    return not any(alarm.name in names for alarm in ALARMS if alarm.of_probes)


def not_asked(findings: Sequence[Finding]) -> list[str]:
    """The names of the alarms with the verdict "not asked"; without probes, all alarms that need probes are added."""
    absent = [alarm.name for alarm in ALARMS if alarm.of_probes] if without_probes(findings) else []
    return [finding.alarm for finding in findings if finding.verdict == "not asked"] + absent


# -- rows -------------------------------------------------------------------------------------------------------------


def column_legend(rows: Sequence[Row]) -> list[str]:
    """The paragraphs that explain the table of all rows; a paragraph is left out if it concerns no row."""
    early = dict.fromkeys(row.attack for row in rows if row.may_end_early)
    return paragraphs("columns.jinja", rows=rows, early=list(early))


def notes_on_rows(rows: Sequence[Row], headline: Row | None) -> list[str]:
    """The notes of a report on images without a search, and on a small number of images."""
    # Another note tells of rows that were cut short.
    own = [row for row in rows if row.threat is None and CUT not in row.warnings]
    stopped = [row for row in own if row.unsearched and not row.settings.get("nearest")]
    near = [row for row in own if row.unsearched and row.settings.get("nearest")]
    texts = dict.fromkeys(text for row in rows for text in row.warnings if text != CUT)
    warned = {text: [row.attack for row in rows if text in row.warnings] for text in texts}
    return paragraphs("notes.jinja", stopped=stopped, near=near, warned=warned, headline=headline, own=own)


def paragraphs(template: str, **values: Any) -> list[str]:
    """The paragraphs of a rendered template, each in a single line."""
    parts = render(template, **values).split("\n\n")
    return [" ".join(part.split()) for part in parts if part.strip()]


# -- makes the HTML page of a report, which contains all of its styles, drawings and pictures --------------------------

#: The largest number of purified images that are shown for each image.
SAMPLES = 4

#: An image ``[C, H, W]`` in [0, 1] with C = 1 or 3, its caption, and whether the class in the caption is the true class
#: (None: the caption names no predicted class).
Picture = tuple[Tensor, str, bool | None]


def html_page(report: Any, defence: Classifier | None = None) -> str:
    """Make the page of a report."""
    own = [row for row in report.rows if row.threat is None]
    evidence = Evidence([row for row in own if row.kind == "clean" or row.is_attack])
    # The attack to which most images fell (in most draws).
    fallen = [(row, int((wrong > 0.5).sum())) for row, wrong in evidence.fallen()]
    drawable = [pair for pair in fallen if pair[0].examples is not None and pair[0].examples.clean.shape[1] in (1, 3)]
    pictured: Any = max(drawable, key=itemgetter(1), default=(None, 0))[0]
    shown: dict[str, Any] = {"pictured": pictured, "pictures": []}
    if pictured is not None:
        shown["pictures"] = picture_lines(pictured.examples, defence)
        shown["change"] = np.abs(pictured.examples.adversarial - pictured.examples.clean).max()
    shown["curves"] = [(what, _curve(points)) for what, points in report.curves.items() if len(points) > 1]
    shown |= {"counted": evidence.with_counted_gradients(), "own": own, "report": report}
    return render("page.html.jinja", json=functools.partial(json.dumps, ensure_ascii=False, default=str), **shown)


def _curve(points: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return the points of a curve, each with its horizontal position from 0 to 1 and its standard error."""
    settings, accuracies = np.array(points).T
    # The axis is logarithmic if the settings grow by factors, such as numbers of steps.
    scale = np.log(settings) if settings[-1] > 12 * settings[0] else settings
    across = (scale - scale[0]) / (scale[-1] - scale[0])
    errors = np.sqrt(accuracies * (1 - accuracies) / PROBED)
    return [
        {"across": x, "setting": f"{setting:.3g}", "accuracy": accuracy, "error": error}
        for x, setting, accuracy, error in zip(across, settings, accuracies, errors, strict=True)
    ]


# -- attacked images --------------------------------------------------------------------------------------------------


def picture_lines(examples: Examples, defence: Classifier | None) -> list[list[Picture]]:
    """A line of pictures for each image: clean, attacked, the difference in colors, and the defence's images."""
    clean, attacked = torch.from_numpy(examples.clean).float(), torch.from_numpy(examples.adversarial).float()
    before, columns = _asked(defence, clean, attacked)
    after, colored = torch.from_numpy(examples.predicted), in_colors(attacked - clean)
    # A model that this package saved knows the names of its classes.
    names = getattr(getattr(defence, "classifier", defence), "classes", None) or {}
    named = dict(enumerate(names))
    lines = []
    for i, label in enumerate(examples.labels.tolist()):
        true = f"true class {named.get(label, label)}"
        shown = [(true, clean, before), ("attacked", attacked, after), ("difference", colored, None)]
        lines.append(list[Picture]())
        for caption, images, classes in (*shown, *columns):
            guess = None if classes is None else int(classes[i])
            if guess is not None:
                caption += f", predicted {named.get(guess, guess)}" if guess >= 0 else ", no class predicted"
            lines[-1].append((images[i].clamp(0, 1), caption, None if guess is None else guess == label))
    return lines


def in_colors(difference: Tensor) -> Tensor:
    """Color differences ``[M, C, H, W]``: red where the channel that changed most grew, blue where it fell."""
    most = difference.gather(1, difference.abs().argmax(1, keepdim=True))
    share = most / (float(most.abs().max()) or 1.0)
    return torch.cat([1 + share.clamp(max=0), 1 - share.abs(), 1 - share.clamp(min=0)], 1)


@torch.no_grad()
def _asked(defence: Any, x: Tensor, attacked: Tensor) -> tuple[Tensor | None, list[tuple[str, Tensor, Tensor | None]]]:
    """Return the predicted classes of the clean images, and columns of images that the defence makes."""
    if defence is None:
        return None, []
    device = device_of(defence, x)

    def fixed(call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        torch.manual_seed(0)
        with defence.fixed_noise(0) if supports(defence, FixedNoise) else contextlib.nullcontext():
            return call(images.to(device)).cpu()

    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), frozen(defence):
        before = fixed(defence, x).argmax(1)
        if not supports(defence, "purify"):
            return before, []
        classes = fixed(defence.sample_logits, attacked).argmax(2) if supports(defence, SampleLogits) else None
        images = fixed(defence.purify, attacked)
    images = (images if images.dim() == 5 else images[:, None])[:, :SAMPLES].float()
    samples = range(images.shape[1])
    return before, [("purified", images[:, k], None if classes is None else classes[:, k]) for k in samples]


def data_uri(image: Tensor) -> str:
    """An image ``[C, H, W]`` in [0, 1], C = 1 or 3, as the data URI of a PNG."""
    # A report without pictures does not need it.
    from torchvision.io import encode_png

    png = encode_png((image * 255).round().to(torch.uint8), compression_level=9)
    return "data:image/png;base64," + base64.b64encode(png.numpy().tobytes()).decode("ascii")
