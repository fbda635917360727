"""What an evaluation found: one row per attack, image by image, so that models can be compared in pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_text

FORMAT = 1


@dataclass
class Examples:
    """A few attacked images: clean and adversarial ``[M, C, H, W]`` float32 in [0, 1], true labels ``[M]`` int64."""

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray


@dataclass
class Row:
    """One model under one attack.

    Attributes:
        model, attack: their names; the pair identifies the row. kind: ``clean``, an attack's kind, or ``worst``.
        variant: what of the model was attacked and judged: ``random``, ``fixed`` noise, or ``deterministic``.
        robust: bool ``[n]``, image by image. Clean: the first prediction was right. Attacks: the image was classified
            correctly, and all ``n_eval`` predictions on the adversarial image were right.
        mean: mean accuracy of one prediction, over ``n_eval``. worst: share of images with all ``n_eval`` right.
        health: counts of the gradients (``gradients nonfinite zero images unmoved``), or None.
        reliable: whether the attack had gradients to work with; if not, the true number may be lower.
        data: a hash of the images and labels. seconds: wall clock.
        threat: the threat model, such as ``L2 0.5``, where it is another than the report's; such a row is in no
            headline and in no ``worst`` but its own.
    """

    model: str
    attack: str
    kind: str
    variant: str
    robust: np.ndarray
    mean: float
    worst: float
    n_eval: int
    seed: int
    seconds: float
    data: str
    health: dict[str, int] | None = None
    reliable: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    threat: str | None = None
    examples: Examples | None = field(default=None, compare=False, repr=False)

    @property
    def n(self) -> int:
        """Images."""
        return len(self.robust)

    @property
    def accuracy(self) -> float:
        """Share of robust images."""
        return float(self.robust.mean())

    @property
    def standard_error(self) -> float:
        """Binomial: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``robust`` as a string of 0 and 1; without the examples."""
        values = {name: value for name, value in self.__dict__.items() if name not in ("robust", "examples")}
        values |= {"n": self.n, "accuracy": self.accuracy, "standard_error": self.standard_error}
        return values | {"robust": "".join("1" if right else "0" for right in self.robust)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        derived = ("n", "accuracy", "standard_error")
        values = {name: value for name, value in values.items() if name not in derived}
        return cls(**values | {"robust": np.array([c == "1" for c in values["robust"]], dtype=bool)})

    def describe_health(self) -> str:
        """The shares of non-finite and zero gradients and of unmoved images, as one short text."""
        if self.health is None:
            return "-"
        h = self.health
        text = f"{_share(h['nonfinite'], h['gradients'])} / {_share(h['zero'], h['gradients'])}"
        return f"{text} / {_share(h['unmoved'], h['images'])}" if h["images"] else f"{text} / -"


@dataclass(frozen=True)
class Paired:
    """A difference of accuracies on the same n images, with the standard error of the paired differences."""

    difference: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.standard_error:.1f} points (n = {self.n}, paired)"


@dataclass
class Report:
    """Rows of one model, or of several (`merge`), and remarks on what could not be run."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Names of the models, in order."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def attacks(self) -> list[str]:
        """Labels of the rows: clean, then attacks, then the worst over them, then other threat models; in order."""
        order = {"clean": 0, "worst": 2}
        rows = sorted(self.rows, key=lambda row: 3 if row.threat is not None else order.get(row.kind, 1))
        return list(dict.fromkeys(row.attack for row in rows))

    def row(self, attack: str, model: str | None = None) -> Row:
        """The row of ``attack``; ``model`` is needed when there are several. KeyError names what there is."""
        found = [row for row in self.rows if row.attack == attack and model in (None, row.model)]
        if len(found) != 1:
            have = ", ".join(f"{row.model}: {row.attack}" for row in self.rows)
            raise KeyError(f"{len(found)} rows are {attack!r} (model {model!r}); there are {have}")
        return found[0]

    @property
    def headlines(self) -> dict[str, Row]:
        """Per model, the attack row of lowest accuracy, in the report's own threat model.

        An unreliable row counts, and so does one that is not adaptive: an attack's success is a success.
        """
        return {model: row for (model, threat), row in self.lowest.items() if threat is None}

    @property
    def lowest(self) -> dict[tuple[str, str | None], Row]:
        """Per model and threat model, None being the report's own, the attack row of lowest accuracy."""
        best: dict[tuple[str, str | None], Row] = {}
        for row in self.rows:
            if row.kind != "clean":
                before = best.get((row.model, row.threat))
                if before is None or (row.accuracy, not row.reliable) < (before.accuracy, not before.reliable):
                    best[row.model, row.threat] = row
        return best

    @property
    def headline(self) -> Row:
        """The lowest robust accuracy of the one model; ValueError if there are several, or no attack."""
        found = self.headlines
        if len(found) != 1:
            raise ValueError(f"one model with attacks is needed, there are {len(found)}: use headlines")
        return next(iter(found.values()))

    def paired(self, other: Report, row: str = "worst", other_row: str | None = None) -> Paired:
        """Accuracy of this report's model minus the other's on the images both have.

        Args:
            other: a report on the same data. row: the attack's label. other_row: its label there, if another.

        Raises:
            KeyError: no such row, or several. ValueError: the rows are not about the same data.
        """
        mine, theirs = self.row(row), other.row(row if other_row is None else other_row)
        if mine.data != theirs.data:
            raise ValueError(f"{mine.model} and {theirs.model} were evaluated on different images: no pairs")
        n = min(mine.n, theirs.n)
        d = mine.robust[:n].astype(float) - theirs.robust[:n].astype(float)
        return Paired(float(d.mean()), float(d.std() / math.sqrt(n)), n)

    def to_json(self) -> str:
        """All rows with their masks, and each model's headline."""
        headlines = {model: {"attack": row.attack, "accuracy": row.accuracy} for model, row in self.headlines.items()}
        content = {"format": FORMAT, "headlines": headlines, "notes": self.notes}
        return json.dumps(content | {"rows": [row.to_dict() for row in self.rows]}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`; ValueError for another format."""
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"the report has format {content.get('format')!r}, this version reads {FORMAT}")
        return cls([Row.from_dict(row) for row in content["rows"]], content["notes"])

    def to_markdown(self) -> str:
        """The headline of each model, a comparison if there are several, and the table of all rows."""
        lines = ["# Robustness", ""]
        for (model, threat), row in sorted(self.lowest.items(), key=lambda item: item[0][1] is not None):
            what = f"**{model}: {_percent(row)} %**" if threat is None else f"{model}, {threat}: {_percent(row)} %"
            lines.append(f"- {what} robust, the lowest of all attacks ({row.attack}, n = {row.n})")
            lines[-1] += "" if row.reliable else f"; {_MARK}: the true number may be lower"
        if len(self.models) > 1:
            lines += ["", "## Comparison", "", "Accuracy ± standard error, %.", "", *self.comparison()]
        lines += ["", "## Every row", ""]
        lines += _markdown(_COLUMNS, [_cells(row, _MARK) for row in self.rows])
        lines += ["", *_LEGEND]
        if self.notes:
            lines += ["", "Notes:", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def comparison(self) -> list[str]:
        """Lines of a Markdown table: attacks down, models across."""
        return _markdown(["attack", *self.models], [[a, *self._cells(a, _MARK)] for a in self.attacks])

    def to_text(self, color: bool = True) -> str:
        """The table for a terminal, unreliable numbers in red; the comparison only, when there are several models."""
        several = len(self.models) > 1
        table = [["attack", *self.models]] + [[a, *self._cells(a, "unreliable")] for a in self.attacks]
        if not several:
            table = [_COLUMNS] + [_cells(row, "unreliable") for row in self.rows]
        width = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = []
        for line in table:
            cells = [cell.ljust(w) for cell, w in zip(line, width, strict=True)]
            if color:
                cells = [f"\033[31m{cell}\033[0m" if "unreliable" in cell else cell for cell in cells]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([lines[0], "-" * (sum(width) + 2 * len(width) - 2), *lines[1:]])

    def _cells(self, attack: str, mark: str) -> list[str]:
        found = {row.model: row for row in self.rows if row.attack == attack}
        return [
            _percent(found[m]) + ("" if found[m].reliable else f" {mark}") if m in found else "-" for m in self.models
        ]

    def _write(self, folder: Path) -> None:
        write_text(folder / "report.json", self.to_json())
        write_text(folder / "report.md", self.to_markdown())

    def save(self, folder: str | Path, defence: Callable | Mapping[str, Callable] | None = None) -> None:
        """Write ``report.json``, ``report.md``, ``accuracies.png`` and, where examples are kept, ``images_*.png``.

        Each file appears whole or not at all. Without matplotlib the pictures are left out, and a note says so.

        Args:
            folder: made if it is missing.
            defence: for the pictures: its predictions, and its reconstructions if it has ``purify``. Of several
                models, a mapping from their names; those it lacks are shown without.

        Raises:
            ValueError: one defence for several models.
        """
        if callable(defence):
            if len(self.models) > 1:
                raise ValueError(f"the report has several models, {self.models}: give a mapping from their names")
            defence = dict.fromkeys(self.models, defence)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)  # before the pictures, whatever becomes of them
        try:
            from . import plots  # matplotlib is optional

            plots.pyplot()
        except ModuleNotFoundError as error:
            self.notes.append(f"no pictures: {error}")
            self._write(folder)
        else:
            plots.bars(self, folder / "accuracies.png")
            for model in self.models:
                row = next((r for r in self.rows if r.model == model and r.examples is not None), None)
                if row is not None and row.examples is not None and row.examples.clean.shape[1] in (1, 3):
                    e, path = row.examples, folder / f"images_{_slug(model)}.png"
                    plots.grid(
                        e.clean,
                        e.adversarial,
                        e.labels,
                        path,
                        (defence or {}).get(model),
                        title=f"{model}: {row.attack}",
                    )


def merge(reports: Iterable[Report]) -> Report:
    """One report on several models; ValueError if two rows share model and attack."""
    merged = Report()
    for report in reports:
        merged.rows += report.rows
        merged.notes += [note for note in report.notes if note not in merged.notes]
    names = [(row.model, row.attack) for row in merged.rows]
    double = [f"{model}: {attack}" for model, attack in dict.fromkeys(names) if names.count((model, attack)) > 1]
    if double:
        raise ValueError(f"rows must differ in model or attack, these do not: {', '.join(double)}")
    return merged


_MARK = '**<span style="color:red">unreliable</span>**'
_COLUMNS = ["model", "attack", "variant", "EOT", "n", "accuracy", "mean", "worst", "gradients", "", "seed", "s"]
_LEGEND = [
    "variant: the model as it is (random), with fixed noise, or its deterministic version. EOT: draws averaged per"
    " gradient. n: images (in brackets, those attacked, where earlier attacks left only these). accuracy ± binomial"
    " standard error, %: clean, one prediction; under attack, images classified correctly and right in every repeated"
    " prediction. mean: accuracy of one prediction, %. worst: right"
    " in all of the repeated predictions (their number in brackets), %. gradients: share non-finite / zero / images"
    " not moved. s: seconds.",
    "",
    "An attack of another norm or radius than the report's has it at the end of its name: L1, L2, L-inf, or the flow"
    " that moves pixels (StAdv; half the image is 1). It counts for no headline and no worst but its own. BPDA: through"
    " the purifier as if it changed nothing. On the classifier alone: made without the defence, then tried on it, which"
    " says little about an attacker who knows the defence.",
    "",
    f"{_MARK}: the attack lacked gradients (any non-finite one, more than 5 % zero ones, or more than 1 % of the"
    " correctly classified images not moved), so its number measures the gradients, not the model.",
]


def _cells(row: Row, mark: str) -> list[str]:
    return [
        row.model,
        row.attack,
        row.variant,
        str(row.settings.get("eot", "-")),
        f"{row.n} ({row.settings['attacked']})" if row.settings.get("survivors") else str(row.n),
        _percent(row),
        f"{100 * row.mean:.1f}",
        f"{100 * row.worst:.1f} ({row.n_eval})",
        row.describe_health(),
        "" if row.reliable else mark,
        str(row.seed),
        f"{row.seconds:.1f}",
    ]


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _percent(row: Row) -> str:
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / max(1, whole)
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
