"""What an alarm looks at, the evidence, and what it says, a finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..rows import Row
from .probes import Probes

Verdict = Literal["passed", "noted", "unreliable", "not asked"]

#: What a sign may say of the number, in words for the reader of a report.
STATES = {
    "passed": "nothing speaks against the number",
    "noted": "worth knowing, and no reason to doubt the number",
    "unreliable": "a reason to doubt the number",
    "not asked": "nothing was measured that could tell",
}


@dataclass(frozen=True)
class Finding:
    """One line of the table "can this number be believed".

    Args:
        alarm: what was looked at.
        verdict: "passed": nothing speaks against the number; "noted": worth knowing, and no reason to doubt the number;
            "unreliable": a reason to doubt it; "not asked": nothing was measured that could tell.
        measured: the numbers, in words.
        row: the row that gives it away, or the probe.
        model: the model's name.
        of_answers: whether the alarm is about a model that gives no answer, or not always the same: its successes and
            failures are both doubtful, also where no image is left.
        prominent: whether it is told beside the headline where it is no more than noted.
    """

    alarm: str
    verdict: Verdict
    measured: str
    row: str = ""
    model: str = ""
    of_answers: bool = False
    prominent: bool = False

    @property
    def beside_headline(self) -> bool:
        """Whether a reader of the lowest number must know it."""
        return self.verdict == "unreliable" or (self.verdict == "noted" and self.prominent)


@dataclass(frozen=True)
class Evidence:
    """What is known about one model under the report's threat model.

    Args:
        rows: the clean rows and the attacks, in the order in which they were made; no ``worst``.
        probes: what the model was asked besides; None if it was not.
        classes: how many classes the model has; None if that is not known.
        probabilities: whether the model returns probabilities where logits are wanted; None if that is not known.
    """

    rows: Sequence[Row]
    probes: Probes | None = None
    classes: int | None = None
    probabilities: bool | None = None

    def attacks(self) -> list[Row]:
        """The attacks within the report's own threat model, judged by the model as it is deployed."""
        return [row for row in self.rows if row.is_attack and row.threat is None and row.deployed]

    def with_counted_gradients(self) -> list[Row]:
        """The attacks that followed the model's own gradients and counted them."""
        return [row for row in self.attacks() if row.health is not None and row.own_gradients]

    def left(self, n: int | None = None) -> float | None:
        """The share of the first n images, or of all, that withstood every attack; None without such an attack."""
        n = max((row.n for row in self.rows), default=0) if n is None else n
        if n == 0:
            return None
        masks = [row.robust[:n] for row in self.attacks() if row.n >= n]
        return float(np.logical_and.reduce(masks).mean()) if masks else None

    def fallen(self) -> list[tuple[Row, np.ndarray]]:
        """Every attack with the images that fell to it, bool ``[n]``: of survivors, those that it was given."""
        clean = {row.variant: row.robust for row in self.rows if row.kind == "clean"}
        left: dict[str, np.ndarray] = {}
        fallen = []
        for row in self.attacks():
            right = clean.get(row.variant, np.ones(row.n, dtype=bool))
            before = left.setdefault(row.variant, right.copy())
            given = before if row.of_survivors else right
            fallen.append((row, given[: row.n] & ~row.robust))
            before[: row.n] &= row.robust
        return fallen
