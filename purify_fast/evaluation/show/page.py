"""A report as one HTML page that needs nothing else: styles, drawings and pictures are inside it.

Building it needs jinja2, which comes with PyTorch and with the extra ``report``.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..._files import write_text
from ...protocols import Classifier
from ..alarms import Evidence, Finding, Outlook
from ..alarms.answers import PROBED
from ..rows import AUTHORS, Examples, Row
from . import drawings, plots
from .tables import COLUMNS, table_of_findings, table_of_rows
from .text import (
    SIGNS_LEGEND,
    about_gradients,
    about_variants,
    about_zero_errors,
    beside_headline,
    column_legend,
    means,
    signs,
)

#: The page's file, in the folder of the report.
FILE = "report.html"
_TEMPLATE = "page.html.jinja"
#: Images of a row that are shown, and what the defence made of each.
MOST, SAMPLES = 8, 3
#: How the columns of `purify_fast.evaluation.show.plots.look` are called; one without a name goes on with the last.
_NAMES = {"transformed": "transformed", "reconstructions": "purified", "": "purified"}


class Reported(Protocol):
    """What the page is made of: a `purify_fast.evaluation.Report`."""

    rows: list[Row]
    notes: list[str]
    about: dict[str, str]
    findings: list[Finding]
    outlooks: list[Outlook]
    curves: dict[str, dict[str, list[list[float]]]]

    @property
    def models(self) -> list[str]:
        """Names of the models, in order."""
        ...

    @property
    def headlines(self) -> dict[str, Row]:
        """Per model the attack row of lowest accuracy, in the report's own threat model."""
        ...


def html_page(report: Reported, defence: Classifier | Mapping[str, Classifier] | None = None) -> str:
    """The page of a report.

    Args:
        report: an evaluation of one model, or of several.
        defence: for the pictures: its predictions, and what it makes of attacked images if it has ``purify``. Of
            several models, a mapping from their names.

    Returns:
        HTML that loads nothing from anywhere.

    Raises:
        ModuleNotFoundError: jinja2 is missing; the message names the extra that installs it.
    """
    try:
        # optional: it comes with PyTorch, and with the extra report
        import jinja2

        # jinja2 depends on it
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the HTML page needs jinja2, which is not installed: pip install 'purify-fast[report]'"
        ) from error
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # every text of the report is escaped; only the drawings, which are made here, are not
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    known = dict.fromkeys(report.models, defence) if callable(defence) else dict(defence or {})
    models = [_model(report, name, known.get(name)) for name in report.models]
    return environment.from_string(source).render(
        titled=[
            f"{name} {value}" if name in ("protocol", "precision", "seed") else value
            for name, value in report.about.items()
        ],
        models=models,
        columns=COLUMNS[1:],
        notes=report.notes,
        several=len(models) > 1,
        widest=max((len(line) for model in models for line in model["pictures"]), default=3),
        markup=Markup,
    )


def page_file(folder: str | Path) -> Path:
    """Where the page of a report is: beside ``report.json``."""
    return Path(folder) / FILE


def write_page(
    report: Reported, folder: str | Path, defence: Classifier | Mapping[str, Classifier] | None = None
) -> Path:
    """Write the page into a report's folder; it appears whole or not at all.

    Args:
        report: as of `html_page`.
        folder: where ``report.json`` is.
        defence: as of `html_page`.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: jinja2 is missing.
    """
    path = page_file(folder)
    write_text(path, html_page(report, defence))
    return path


def _model(report: Reported, name: str, defence: Classifier | None) -> dict[str, Any]:
    """What the page says of one model."""
    rows = [row for row in report.rows if row.model == name]
    own = [row for row in rows if row.threat is None]
    attacks = _comparable([row for row in own if row.is_attack])
    # what had fallen before was not given to an attack on survivors: nothing tells whether it falls to that too
    whole = [row for row in attacks if not row.of_survivors]
    lowest = report.headlines.get(name)
    evidence = Evidence([row for row in own if row.kind == "clean" or row.is_attack])
    fallen = [(row, int(fell.sum())) for row, fell in evidence.fallen()]
    # the strongest attack's pictures: those of a weaker one, or of what was left to it, would flatter the model
    pictured = [(row, count) for row, count in fallen if row.examples is not None]
    shown, count = max(pictured, key=lambda pair: pair[1], default=(None, 0))
    examples = None if shown is None else shown.examples
    findings = [finding for finding in report.findings if finding.model == name]
    usable = examples is not None and examples.clean.shape[1] in (1, 3)
    return {
        "name": name,
        "lowest": lowest,
        "clean": next((row for row in own if row.kind == "clean" and row.deployed), None),
        "count": sum(row.deployed for row in attacks),
        "of_authors": any(row.kind == AUTHORS for row in rows),
        "rows": [
            {"cells": cells[1:], "kind": row.kind, "reliable": row.reliable, "json": json.dumps(row.accuracy)}
            for row, cells in zip(rows, table_of_rows(rows).body, strict=True)
        ],
        "legend": column_legend(rows),
        "bars": drawings.bars(own),
        "zero_errors": about_zero_errors(rows),
        "overlap": drawings.overlap(whole) if len(whole) > 1 else "",
        "alone": list(zip((row.attack for row in whole), drawings.only_found_by(whole), strict=True)),
        "first": [(row.attack, count) for row, count in fallen if row.of_survivors],
        "findings": table_of_findings(findings),
        "verdict": "" if lowest is None else _verdict(lowest, findings, own),
        "variants": about_variants(rows),
        "signs": signs(findings),
        "states": SIGNS_LEGEND,
        "beside": beside_headline(findings),
        "outlook": next((outlook for outlook in report.outlooks if outlook.model == name), None),
        "curves": _curves(report.curves.get(name, {})),
        "pictures": picture_grid(examples, defence) if usable and examples is not None else [],
        "pictured": "" if shown is None else shown.attack,
        "chosen": "" if examples is None else chosen(examples, count),
        "settings": [(row.attack, json.dumps(row.settings, ensure_ascii=False, default=str)) for row in rows],
        "seconds": sum(row.seconds for row in rows if row.kind != "worst"),
        "seed": rows[0].seed,
    }


def _verdict(lowest: Row, findings: Sequence[Finding], own: Sequence[Row]) -> str:
    """What a reader of the lowest number must know before all."""
    beside = beside_headline(findings)
    if not lowest.reliable:
        doubt = f"Do not believe this number: {means(lowest)}."
        return f"{doubt} What gives it away:" if beside else f"{doubt} {about_gradients(own)}"
    if lowest.nothing_to_attack:
        return "No clean image was classified correctly, so that there was nothing to attack."
    if beside:
        return "This number says little:"
    if lowest.accuracy == 0:
        return "Every image fell: no attack can leave less."
    return f"{about_gradients(own)} The number is an upper bound: a stronger attack may leave less."


def _curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> list[tuple[str, str]]:
    """The curves of the probes as drawings, with what each is over."""
    return [
        (name, drawings.curve([(x, y, math.sqrt(y * (1 - y) / PROBED)) for x, y in points], name))
        for name, points in curves.items()
        if len(points) > 1
    ]


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """The attacks on as many images as most: an overlap is of the same images."""
    most = max((row.n for row in rows), default=0)
    return [row for row in rows if row.n == most]


@dataclass(frozen=True)
class Picture:
    """One picture of the grid.

    Args:
        source: the PNG as a data URI.
        caption: what is written below it.
        right: whether the class in the caption is the true one; None where there is none.
    """

    source: str
    caption: str
    right: bool | None = None


def data_uri(image: Tensor) -> str:
    """An image ``[C, H, W]`` in [0, 1], C = 1 or 3, as a PNG inside a URI."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[2] == 1 else array).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def picture_grid(examples: Examples, defence: Classifier | None) -> list[list[Picture]]:
    """One line per image: clean, adversarial, the difference, and what the defence makes of it.

    Args:
        examples: attacked images with C = 1 or 3. The classes predicted after the attack are theirs: a random defence
            that is asked again may say something else.
        defence: gives the predicted classes, and the purified images if it has ``purify``.
    """
    clean, attacked = (torch.from_numpy(part[:MOST]).float() for part in (examples.clean, examples.adversarial))
    labels = torch.from_numpy(examples.labels[:MOST])
    (before, _), columns = plots.look(defence, clean, attacked, SAMPLES, 0)
    after = torch.from_numpy(examples.predicted[:MOST])
    difference = attacked - clean
    largest = float(difference.abs().max()) or 1.0
    lines = []
    for i, label in enumerate(labels):
        line = [
            _classified(f"true class {int(label)}", clean[i], before, i, label),
            _classified("attacked", attacked[i], after, i, label),
            Picture(data_uri(0.5 + difference[i] / (2 * largest)), "difference"),
        ]
        line += [_classified(_NAMES[name], images[i], classes, i, label) for images, classes, name in columns]
        lines.append(line)
    return lines


def _classified(what: str, image: Tensor, classes: Tensor | None, i: int, label: Tensor) -> Picture:
    if classes is None:
        return Picture(data_uri(image), what)
    named = f"predicted {int(classes[i])}" if classes[i] >= 0 else "no class predicted"
    return Picture(data_uri(image), f"{what}, {named}", bool(classes[i] == label))


def chosen(examples: Examples, fell: int) -> str:
    """Which images are shown, in a sentence, where so many fell to the attack."""
    shown = min(MOST, len(examples.labels))
    if not examples.fell.any():
        return f"No image fell to this attack. The {shown} shown withstood it."
    if fell > shown:
        return f"{shown} of the {fell} images that fell to this attack."
    return "The only image that fell to this attack." if shown == 1 else f"All {shown} images that fell to this attack."
