"""What an alarm looks at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..rows import Row
from .probes import Probes

Verdict = Literal["passed", "noted", "unreliable", "not asked"]


@dataclass(frozen=True)
class Finding:
    """One line of the table "can this number be believed".

    Args:
        alarm: what was looked at.
        verdict: "unreliable": the model's true accuracy may well be lower; "noted": worth a look; "passed"; "not
            asked": nothing was measured that could tell.
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
        """The attacks within the report's own threat model."""
        return [row for row in self.rows if row.kind not in ("clean", "worst") and row.threat is None]

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
