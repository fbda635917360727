"""A report as one HTML page that needs nothing else: styles, drawings and pictures are inside it."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..._files import write_text
from ...protocols import Classifier
from ..alarms import Evidence, Finding, Outlook
from ..alarms.answers import PROBED
from ..rows import Examples, Row
from .plots import picture_lines, pictured_row
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
    """
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # every text of the report is escaped
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    asked = (about_variants, about_zero_errors, beside_headline, column_legend, signs, table_of_findings)
    environment.globals |= {function.__name__: function for function in asked} | {
        "json": functools.partial(json.dumps, ensure_ascii=False, default=str)
    }
    known = dict.fromkeys(report.models, defence) if callable(defence) else dict(defence or {})
    models = [_model(report, name, known.get(name)) for name in report.models]
    return environment.from_string(source).render(
        titled=[
            f"{name} {value}" if name in ("protocol", "precision", "seed") else value
            for name, value in report.about.items()
        ],
        models=models,
        columns=COLUMNS[1:],
        states=SIGNS_LEGEND,
        notes=report.notes,
        several=len(models) > 1,
        widest=max((len(line) for model in models for line in model["pictures"]), default=3),
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
    """
    path = page_file(folder)
    write_text(path, html_page(report, defence))
    return path


def _model(report: Reported, name: str, defence: Classifier | None) -> dict[str, Any]:
    """What the page says of one model."""
    rows = [row for row in report.rows if row.model == name]
    own = [row for row in rows if row.threat is None]
    attacks = [row for row in own if row.is_attack]
    # an overlap is of the same images, and what had fallen before was not given to an attack on survivors
    most = [row for row in attacks if row.n == max(each.n for each in attacks)]
    whole = [row for row in most if not row.of_survivors]
    lowest = report.headlines.get(name)
    fallen = Evidence([row for row in own if row.kind == "clean" or row.is_attack]).fallen()
    shown, count = pictured_row(rows)
    examples = None if shown is None else shown.examples
    lines = [] if examples is None else picture_lines(examples, defence)
    findings = [finding for finding in report.findings if finding.model == name]
    return {
        "name": name,
        "rows": rows,
        "own": own,
        "table": list(zip(rows, table_of_rows(rows).body, strict=True)),
        "lowest": lowest,
        "verdict": "" if lowest is None else _verdict(lowest, findings, own),
        "count": sum(row.deployed for row in most),
        "findings": findings,
        "outlook": next((outlook for outlook in report.outlooks if outlook.model == name), None),
        "overlap": _overlap(whole) if len(whole) > 1 else [],
        "alone": _alone(whole) if len(whole) > 1 else [],
        "first": [(row.attack, int(fell.sum())) for row, fell in fallen if row.of_survivors],
        "curves": [(what, _curve(points)) for what, points in report.curves.get(name, {}).items() if len(points) > 1],
        "pictures": [[(data_uri(each.image), each.caption, each.right) for each in line] for line in lines],
        "pictured": "" if shown is None else shown.attack,
        "chosen": "" if examples is None else chosen(examples, count),
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


def _curve(points: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The points of a curve, by rising setting, with their places from left (0) to right (1) and standard errors."""
    settings, accuracies = np.array(points).T
    # settings that grow by factors, such as steps, stand at equal distances for equal factors
    scale = np.log(settings) if settings[0] > 0 and settings[-1] > 12 * settings[0] else settings
    across = (scale - scale[0]) / (scale[-1] - scale[0])
    errors = np.sqrt(accuracies * (1 - accuracies) / PROBED)
    return [
        {"across": x, "setting": f"{setting:.3g}", "accuracy": accuracy, "error": error}
        for x, setting, accuracy, error in zip(across, settings, accuracies, errors, strict=True)
    ]


def _overlap(rows: Sequence[Row]) -> list[tuple[str, list[float | None]]]:
    """For each attack, of the images that it fools, the share that each attack fools; None where it fools none."""
    fell = np.stack([~row.robust for row in rows])
    return [
        (row.attack, [float(other[one].mean()) if one.any() else None for other in fell])
        for row, one in zip(rows, fell, strict=True)
    ]


def _alone(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """For each attack, how many images it alone fools."""
    fell = np.stack([~row.robust for row in rows])
    return [(row.attack, int((one & (fell.sum(0) == 1)).sum())) for row, one in zip(rows, fell, strict=True)]


def data_uri(image: Tensor) -> str:
    """An image ``[C, H, W]`` in [0, 1], C = 1 or 3, as a PNG inside a URI."""
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def chosen(examples: Examples, fell: int) -> str:
    """Which images are shown, in a sentence, where so many fell to the attack."""
    shown = len(examples.labels)
    if not examples.fell.any():
        return f"No image fell to this attack. The {shown} shown withstood it."
    if fell > shown:
        return f"{shown} of the {fell} images that fell to this attack."
    return "The only image that fell to this attack." if shown == 1 else f"All {shown} images that fell to this attack."
