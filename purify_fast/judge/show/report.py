"""Defines the report of an evaluation. It has a row for each attack, computes numbers from rows, and writes files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..._files import write_text
from ..._places import check_folder
from ...protocols import Classifier
from ..alarms.signs import Finding
from ..results.rows import ClaimTest, Paired, Row, judge_claim
from .adversarial import Adversarial
from .page import html_page
from .text import comparison, markdown_table, render

#: Format 3 has the rule for random models by which other draws judge a point than those that chose it.
FORMAT = 3


@dataclass(repr=False)
class Report:
    """The rows of one model, or of several models (`merge`), with notes and alarms.

    Args:
        rows: the rows, in the order in which they were made.
        notes: remarks, each a sentence, for example on attacks that could not be run.
        about: facts about all rows, if known: ``threat`` (such as ``L-inf 8/255``), ``dataset``, ``protocol``,
            ``changed`` (settings that change the protocol, such as ``steps 5``), ``seed``, ``version`` (of this
            package, PyTorch and Python), ``predict``, ``precision`` (if not float32), ``claim`` (in percent), ``date``
            of the first `save`, ``command``, ``model`` (a hash of weights and code), ``processor``, ``captured`` (the
            CUDA graphs of attack steps, and why some steps have none), and the costs
            ``passes`` (forwards and gradients per image), ``seconds`` and ``peak_memory``.
        findings: the results of the alarms, which test whether the numbers are reliable.
        curves: by model, the curves of accuracy over the steps and the draws of the probes, for the page.
        adversarial: the attacked images of the images that fell; None in a report that was read or merged.
        stored: the facts about these images in a report that was read, by which `check_adversarial` knows their file.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    adversarial: Adversarial | None = field(default=None, compare=False)
    stored: dict[str, Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        lowest = (f"{model}: {100 * row.accuracy:.1f} % under {row.attack}" for model, row in self.headlines.items())
        return f"Report({len(self.rows)} rows of {len(self.models)} models; lowest: {', '.join(lowest) or 'no attack'})"

    @property
    def models(self) -> list[str]:
        """The names of the models, in order."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def attacks(self) -> list[str]:
        """Return the labels of the rows, ordered: clean images, attacks, ``worst``, other threat models."""
        order = {"clean": 0, "worst": 2}
        ordered = sorted(self.rows, key=lambda row: 3 if row.threat is not None else order.get(row.kind, 1))
        return list(dict.fromkeys(row.attack for row in ordered))

    def row(self, attack: str, model: str | None = None) -> Row:
        """The row of an attack.

        Args:
            attack: label of the attack.
            model: the model's name; it is needed if the report has several models.

        Raises:
            KeyError: there is no such row, or there are several; the message lists the rows.
        """
        rows = [row for row in self.rows if row.attack == attack and model in (None, row.model)]
        if len(rows) != 1:
            have = ", ".join(f"{row.model}: {row.attack}" for row in self.rows)
            raise KeyError(f"{attack!r} of {model!r} must name one row, and names {len(rows)}; the report has {have}")
        return rows[0]

    @property
    def headlines(self) -> dict[str, Row]:
        """Return, for each model, the row of lowest accuracy, in the report's threat model."""
        return {model: row for (model, threat), row in self.lowest.items() if threat is None}

    def claim_test(self, row: Row | None = None) -> ClaimTest | None:
        """Test the claim of the report; None if there is no claim.

        Args:
            row: the row that tests it; None for the only model's `headline`.
        """
        row = self.headline if row is None else row
        clean = (one for one in self.rows if one.model == row.model and one.kind == "clean")
        claim = self.about.get("claim")
        return None if claim is None else judge_claim(float(claim) / 100, row, next(clean, None))

    @property
    def lowest(self) -> dict[tuple[str, str | None], Row]:
        """Return, for each model and threat model (None: the report's), the attack row of lowest accuracy."""

        def order(row: Row) -> tuple[float, bool, bool]:
            # Among equal accuracies, prefer the row over all attacks, then a reliable row. The draws that judge a
            # random model choose no row, because the lowest of several noisy numbers is partly luck.
            accuracy = row.accuracy if row.wrong is None else 1 - float(row.wrong.mean())
            return accuracy, row.kind != "worst", not row.reliable

        best: dict[tuple[str, str | None], list[Row]] = {}
        for row in self.rows:
            if row.is_attack or row.kind == "worst":
                best.setdefault((row.model, row.threat), []).append(row)
        return {place: min(rows, key=order) for place, rows in best.items()}

    @property
    def headline(self) -> Row:
        """The attack row of lowest accuracy of the only model; ValueError for several models or without an attack."""
        rows = list(self.headlines.values())
        if len(rows) != 1:
            text = f"headline needs attacks on one model, got {', '.join(self.headlines) or 'none'}: use "
            raise ValueError(f"{text}headlines, or row('clean')")
        return rows[0]

    def attacks_like(self, row: Row) -> list[Row]:
        """Return the attacks on which a ``worst`` row is based; for any other row, return the row itself.

        Args:
            row: a row of this report.
        """
        if row.kind != "worst":
            return [row]
        of = (row.model, row.threat)
        mine = [each for each in self.rows if each.is_attack and (each.model, each.threat) == of]
        return [each for each in mine if each.n >= row.n]

    def paired(self, other: Report, row: str = "worst", other_row: str | None = None) -> Paired:
        """The accuracy of this report's model minus the accuracy of another model, on their common images.

        Args:
            other: a report on the same data, in the same threat model.
            row: the attack's label.
            other_row: the attack's label in the other report; None takes the same label.

        Returns:
            The difference with its standard error.

        Raises:
            KeyError: there is no such row, or there are several.
            ValueError: the rows have different data, or are attacks in different threat models.
        """
        mine, theirs = self.row(row), other.row(row if other_row is None else other_row)
        if mine.data != theirs.data:
            raise ValueError(f"paired needs the same images, but those of {mine.model} and {theirs.model} differ")
        within = [each.threat or report.about.get("threat") for each, report in ((mine, self), (theirs, other))]
        # A report without a threat model is assumed to have the threat model of the other report.
        if "clean" not in (mine.kind, theirs.kind) and None not in within and within[0] != within[1]:
            raise ValueError(f"paired needs the same threat model, got {within[0]} and {within[1]}")
        n = min(mine.n, theirs.n)
        d = mine.robust[:n].astype(float) - theirs.robust[:n].astype(float)
        return Paired(float(d.mean()), float(d.std() / math.sqrt(n)), n)

    def to_json(self) -> str:
        """The report as JSON, with all rows and the headline of each model."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "about": self.about,
            "headlines": {m: {"attack": row.attack, "accuracy": row.accuracy} for m, row in self.headlines.items()},
            "notes": self.notes,
            "findings": [asdict(finding) for finding in self.findings],
            "curves": self.curves,
            "rows": [row.to_dict() for row in self.rows],
        }
        if (known := self.stored if self.adversarial is None else self.adversarial.facts()) is not None:
            content["adversarial"] = known
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report from the result of `to_json`; ValueError for another format."""
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"the report must have format {FORMAT}, got {content.get('format')!r}: evaluate again")
        return cls(
            rows=[Row.from_dict(values) for values in content["rows"]],
            findings=[Finding(**values) for values in content.get("findings", [])],
            stored=content.get("adversarial"),
            **{name: content[name] for name in ("notes", "about", "curves") if name in content},
        )

    def to_markdown(self) -> str:
        """The report as Markdown: the headline of each model, a comparison of several models, and all rows."""
        lowest = sorted(self.lowest.items(), key=lambda item: item[0][1] is not None)
        return render("report.md.jinja", report=self, lowest=lowest)

    def to_html(self, defence: Classifier | Mapping[str, Classifier] | None = None) -> str:
        """The report as a HTML page that loads no other files.

        Args:
            defence: the model, which makes predictions and purified images for the pictures. For several models, a
                mapping from their names to the models. A model without an entry has no such pictures.

        Raises:
            ValueError: a single defence for several models.
        """
        if callable(defence) and len(self.models) > 1:
            raise ValueError(f"defence must be a mapping from {', '.join(self.models)} to models, got a single one")
        return html_page(self, defence)

    @property
    def title(self) -> list[str]:
        """The known words of the title: threat model, data set, protocol, prediction rule, precision and versions."""
        changed = f", changed: {self.about['changed']}" if "changed" in self.about else ""
        known = self.about | {"protocol": self.about.get("protocol", "") + changed}
        words = {"threat": "", "dataset": "", "protocol": "protocol ", "predict": "predict ", "precision": "precision "}
        return [word + known[what] for what, word in (words | {"version": ""}).items() if known.get(what)]

    def comparison(self) -> list[str]:
        """The lines of a Markdown table with a line for each attack and a column for each model."""
        return markdown_table(*comparison(self))

    def to_text(self) -> str:
        """Return the report as text for a terminal: title and table, or only the comparison of several models."""
        return render("report.txt.jinja", report=self).rstrip()

    def save(self, folder: str | Path, defence: Classifier | Mapping[str, Classifier] | None = None) -> None:
        """Write ``report.html``, ``report.json``, ``report.md`` and ``adversarial.npz``.

        The last file has the arrays of `Adversarial`; a report that was read or merged does not write it. Each file is
        written atomically. A report that is in the folder is replaced.

        Args:
            folder: folder of the report; it is made if it is missing.
            defence: the model for the pictures, see `to_html`.

        Raises:
            ValueError: a single defence for several models.
        """
        folder = Path(folder)
        check_folder("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Before the report that names the file, so that no report is without its images.
        if self.adversarial is not None:
            self.adversarial.save(folder)
        self.about.setdefault("date", datetime.now().astimezone().isoformat(" ", "minutes"))
        write_text(folder / "report.json", self.to_json())
        write_text(folder / "report.md", self.to_markdown())
        # The page is written last, because the defence may raise an error on the pictures. The other files then exist.
        write_text(folder / "report.html", self.to_html(defence))


def merge(reports: Iterable[Report]) -> Report:
    """Merge reports into a report on several models.

    Args:
        reports: reports of the models, on the same images or on different images.

    Raises:
        ValueError: threat models, prediction rules or precisions differ, or two rows have the same model and attack.
    """
    merged = Report()
    together = list(reports)
    # A report without a threat model has that of the other reports, and without a precision float32.
    facts = {what: {report.about.get(what) for report in together} for what in ("threat", "precision")}
    # Every rule of prediction gives the same numbers of a deterministic model.
    random = [report for report in together if not all(row.deterministic for row in report.rows)]
    facts["predict"] = {report.about.get("predict") for report in random}
    facts["threat"].discard(None)
    differing = [what for what, values in facts.items() if len(values) > 1]
    if differing:
        raise ValueError(f"merged reports must have the same {' and '.join(differing)}, got different ones")
    for report in together:
        merged.rows += report.rows
        merged.findings += report.findings
        merged.curves |= report.curves
        merged.notes += [note for note in report.notes if note not in merged.notes]
    if together:
        # The merged report names no command, because several commands may have made the reports.
        shared = {key: value for key, value in together[0].about.items() if key != "command"}
        merged.about = {key: value for key, value in shared.items() if all(r.about.get(key) == value for r in together)}
        # A protocol that some of the reports changed is not the same.
        if len({report.about.get("changed") for report in together}) > 1:
            merged.about.pop("protocol", None)
        merged.about |= {what: value for what in ("threat", "predict") for value in facts[what] if value}
    counts = Counter((row.model, row.attack) for row in merged.rows)
    double = [f"{model}: {attack}" for (model, attack), count in counts.items() if count > 1]
    if double:
        raise ValueError(f"merged rows must differ in model or attack, got {', '.join(double)}: give each a name")
    return merged
