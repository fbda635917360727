"""Two data classes: the evidence for the alarms (results of attacks and probes), and the finding of an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..results.rows import Row
from .answers import Missing
from .probes import Probes

Verdict = Literal["passed", "noted", "unreliable", "not asked"]

#: The report's words for each reason why gradients could not be used.
MISSING: dict[Missing, str] = {
    "not finite": "logits or gradients are not finite",
    "no gradient": "there is no gradient: PyTorch has no derivative of the output with respect to the images",
    "zero gradient": "the gradient is zero everywhere",
}

#: Class names of the models in which a purifier or another part has the gradient of the identity, as in BPDA.
IDENTITIES = ("BpdaModel", "IdentityBackward")
#: A report does not advise more draws per gradient if an attack has averaged at least this number of draws.
MANY_DRAWS = 20

#: The meaning of each verdict, in words for the reader of a report. "The number" is the robust accuracy.
STATES = {
    "passed": "nothing speaks against the number",
    "noted": "worth knowing, and no reason to doubt the number",
    "unreliable": "a reason to doubt the number",
    "not asked": "nothing was measured that could tell",
}


@dataclass(frozen=True)
class Finding:
    """The result of one alarm, which is a line in the table "Can this number be believed?" of a report.

    Args:
        alarm: name of the alarm.
        verdict: "passed", "noted", "unreliable" or "not asked", see `purify_fast.evaluation.alarms`.
        measured: the measurements, in words.
        row: the name of the attack, or of the probe, that shows the sign.
        model: the model's name.
        of_answers: whether the alarm is about missing or inconsistent predictions, which make even 0 % doubtful.
        prominent: whether the report shows the finding next to the headline even if it is only noted.
        advice: what to do; empty if there is nothing to do.
    """

    alarm: str
    verdict: Verdict
    measured: str
    row: str = ""
    model: str = ""
    of_answers: bool = False
    prominent: bool = False
    advice: str = ""

    @property
    def beside_headline(self) -> bool:
        """Tell whether the report shows the finding next to its headline."""
        return self.verdict == "unreliable" or (self.verdict == "noted" and self.prominent)

    @property
    def told(self) -> str:
        """The finding as a text, with the attack or the probe that shows it."""
        return f"{self.alarm}: {self.measured}" + (f" ({self.row})" if self.row else "")


@dataclass(frozen=True)
class Evidence:
    """The evidence about one model, which the alarms judge.

    Args:
        rows: the clean rows and the rows of attacks, as they were made; rows over several attacks are left out.
        probes: the measurements of the probes; None if there were no probes.
        classes: number of the model's classes; None if unknown.
        probabilities: whether the model returns probabilities instead of logits; None if unknown.
        one_hot: whether the probabilities are all 0 or 1.
        protocol: name of the protocol; None for a list of attacks.
        no_gradient: whether the output is known to have no gradient with respect to the images.
        cosine: between the changes that gradients predict and the measured changes; None if not measured.
    """

    rows: Sequence[Row]
    probes: Probes | None = None
    classes: int | None = None
    probabilities: bool | None = None
    one_hot: bool = False
    protocol: str | None = None
    no_gradient: bool = False
    cosine: float | Missing | None = None

    def attacks(self) -> list[Row]:
        """The attacks in the report's threat model that were judged on the deployed model."""
        return [row for row in self.rows if row.is_attack and row.threat is None and row.deployed]

    def with_counted_gradients(self) -> list[Row]:
        """The attacks that used the model's own gradients and counted them."""
        return [row for row in self.attacks() if row.health is not None and row.own_gradients]

    def followed_gradients(self) -> bool:
        """Tell whether an attack followed the model's own gradients, and not those of BPDA or of another model."""
        counted = self.with_counted_gradients()
        return any(row.kind != "bpda" and not row.settings.get("gradients_from") for row in counted)

    def tried(self) -> set[str]:
        """The stronger attacks that ran on more than a few images, by their names in `signs.EFFORTS`."""
        tried = {"strong"} if self.protocol == "strong" else set[str]()
        for row in self.attacks():
            of = row.settings.get
            if of("nearest"):
                continue
            tried |= {"BPDA"} if row.kind == "bpda" or of("gradients_from") in IDENTITIES else set()
            tried |= {"draws"} if (of("eot_iter") or 1) >= MANY_DRAWS else set()
        return tried

    @property
    def images(self) -> int:
        """Return the number of all images of the evaluation."""
        return max((row.n for row in self.rows), default=0)

    @property
    def nothing_left(self) -> bool:
        """Tell whether every image has fallen to an attack or to a probe, on a random model in all choosing draws."""
        wrong = self.wrong(self.images)
        if wrong is None:
            return False
        if self.probes is not None:
            wrong[self.probes.fallen()] = 1
        return bool((wrong == 1).all())

    def blind(self) -> str:
        """The reason why the model's gradients could not lead to a success; empty if none is known."""
        counted = self.with_counted_gradients()
        if self.probes is not None and isinstance(self.probes.cosine, str):
            return MISSING[self.probes.cosine]
        lacked = bool(counted) and all(row.lacked_gradients for row in counted)
        return f"the attacks had no usable gradients: {counted[0].health_in_words()}" if lacked else ""

    def wrong(self, n: int) -> np.ndarray | None:
        """For each of the first n images, the largest share of wrong draws after an attack, ``[n]``, or None.

        The draws are those that choose a random model's points, because the draws that judge must stay fresh.
        """
        shares = [row.share_wrong[:n] for row in self.attacks() if row.n >= n]
        return np.maximum.reduce(shares) if shares else None

    def fallen(self) -> list[tuple[Row, np.ndarray]]:
        """Return each attack with the share of wrong draws on its images, ``[images]``; 0 on others."""
        clean = [row.share_wrong for row in self.rows if row.kind == "clean" and row.deployed]
        right = clean[0] < 1 if clean else np.ones(self.images, dtype=bool)
        left, fallen = right.copy(), []
        for row in self.attacks():
            wrong = np.pad(row.share_wrong, (0, len(right) - row.n))
            given = left if row.of_survivors else right
            fallen.append((row, np.where(given, wrong, 0.0)))
            left &= wrong < 1
        return fallen
