"""What an alarm looks at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    """

    alarm: str
    verdict: Verdict
    measured: str
    row: str = ""
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What was found about one model under the report's threat model.

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

    def left(self, n: int | None = None) -> float | None:
        """The share of the first images that withstood every attack.

        Args:
            n: how many images; None: all of them.

        Returns:
            None without an attack on so many images.
        """
        n = max((row.n for row in self.rows), default=0) if n is None else n
        if n == 0:
            return None
        masks = [row.robust[:n] for row in self.attacks() if row.n >= n]
        return float(np.logical_and.reduce(masks).mean()) if masks else None

    def fallen(self) -> list[tuple[Row, np.ndarray]]:
        """Every attack with the images that fell to it, bool ``[n]``: of survivors, those that it was given."""
        clean = {row.variant: row.robust for row in self.rows if row.kind == "clean"}
        left: dict[str, np.ndarray] = {}
        found = []
        for row in self.attacks():
            right = clean.get(row.variant, np.ones(row.n, dtype=bool))
            before = left.setdefault(row.variant, right.copy())
            given = before if row.settings.get("survivors_only") else right
            found.append((row, given[: row.n] & ~row.robust))
            before[: row.n] &= row.robust
        return found
