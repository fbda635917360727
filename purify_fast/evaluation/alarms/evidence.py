"""What is known about a model under attack, what an alarm finds in it, and how much a stronger attack would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..rows import Row
from .answers import Missing
from .probes import Probes

Verdict = Literal["passed", "noted", "unreliable", "not asked"]

#: What is missing where a model's gradients tell nothing, in words.
MISSING: dict[Missing, str] = {
    "not finite": "logits or gradients are not finite",
    "no gradient": "there is no gradient: PyTorch has none of the output to the images",
    "zero gradient": "the gradient is zero everywhere",
}

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
        advice: what to do about it; empty where there is nothing to do.
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
        """Whether a reader of the lowest number must know it."""
        return self.verdict == "unreliable" or (self.verdict == "noted" and self.prominent)

    @property
    def told(self) -> str:
        """The alarm in a sentence, with the row that tells."""
        return f"{self.alarm}: {self.measured}" + (f" ({self.row})" if self.row else "")


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
        robust = self.robust(n) if n else None
        return None if robust is None else float(robust.mean())

    @property
    def nothing_left(self) -> bool:
        """Whether every image has fallen, to the attacks or to the probes."""
        robust = self.robust(max((row.n for row in self.rows), default=0))
        if robust is None:
            return False
        robust[self.fallen_to_probes(len(robust))] = False
        return not robust.any()

    def fallen_to_probes(self, n: int) -> list[int]:
        """Which of the first n images withstood every attack and fell to a probe, by number."""
        return [] if self.probes is None else [image for image in self.probes.fallen if image < n]

    def blind(self) -> str:
        """Why short attacks along the model's gradients could find nothing; empty where they could."""
        counted = self.with_counted_gradients()
        if self.probes is not None and isinstance(self.probes.cosine, str):
            return MISSING[self.probes.cosine]
        lacked = bool(counted) and all(row.lacked_gradients for row in counted)
        return f"the attacks had no usable gradients ({counted[0].describe_health()})" if lacked else ""

    def robust(self, n: int) -> np.ndarray | None:
        """Which of the first n images withstood every attack on as many, bool ``[n]``; None without such an attack."""
        masks = [row.robust[:n] for row in self.attacks() if row.n >= n]
        return np.logical_and.reduce(masks) if masks else None

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


# -- the outlook ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """An estimate of what one more effort of the same kind would find.

    Args:
        points: of accuracy, between 0 and 1: the largest of what the signs below say.
        sentences: the signs, in words.
        model: the model's name.
    """

    points: float
    sentences: tuple[str, ...]
    model: str = ""


def outlook(evidence: Evidence) -> Outlook | None:
    """The estimate for one model, from its attacks on all images; None without any, and where no image is left.

    Args:
        evidence: rows and probes of the model.
    """
    full = max((row.n for row in evidence.rows), default=0)
    fallen = [(row, mask) for row, mask in evidence.fallen() if row.n == full]
    if not fallen:
        return None
    robust = np.logical_and.reduce([row.robust for row, _ in fallen])
    if not robust.any():
        return None
    signs = [_last_gain(fallen, full), _unseen(fallen, full), _margins(fallen, robust), _steps(evidence, robust)]
    known = [sign for sign in signs if sign is not None]
    points = min(max(points for points, _ in known), float(robust.mean()))
    left = robust.copy()
    left[evidence.fallen_to_probes(full)] = False
    text = (
        f"by this estimate one more effort of this kind would take about {100 * points:.1f} of the "
        f"{100 * robust.mean():.1f} percentage points that are left"
    )
    taken, asked = int(robust.sum() - left.sum()), 0 if evidence.probes is None else evidence.probes.n
    if taken:
        # the attacks alone say too little: what the probes took of a part is expected of all
        among = int(robust[:asked].sum())
        points = taken / among * float(left.mean())
        text = (
            f"the probes took {taken} of the {among} images that the attacks had left of the first {asked}: no "
            "estimate from the attacks alone holds"
        )
    return Outlook(points, (text, *(sentence for _, sentence in known)))


Fallen = Sequence[tuple[Row, np.ndarray]]


def _last_gain(fallen: Fallen, n: int) -> tuple[float, str]:
    """What the last attack found that no other had, if it repeats one before it; the first of a kind tells nothing."""
    row, mask = fallen[-1]
    if len(fallen) == 1:
        return 0.0, f"there was one attack only ({row.attack}): nothing tells what another would find"
    gain = int((mask & ~np.logical_or.reduce([m for _, m in fallen[:-1]])).sum())
    text = f"the last attack ({row.attack}) found {gain} image{'' if gain == 1 else 's'} that all others had left"
    # the same attack with the same loss, whatever the random starts and numbers of steps
    kinds = [(each.kind, each.settings.get("loss")) for each, _ in fallen]
    if kinds[-1] not in kinds[:-1]:
        return 0.0, f"{text}; it was the first of its kind, so this says nothing of another one"
    return gain / n, text


def _unseen(fallen: Fallen, n: int) -> tuple[float, str] | None:
    """Images that only one of several attacks on all images found: many of these mean that others are unseen.

    The estimate of the unseen is Chao's lower bound (1984), f1 (f1 - 1) / (2 (f2 + 1)), f1 being the number of images
    that one attack alone found, and f2 that two found.
    """
    whole = [(row, mask) for row, mask in fallen if not row.of_survivors]
    if len(whole) < 3:
        return None
    times = np.sum([mask for _, mask in whole], 0)
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    unseen = once * (once - 1) / (2 * (twice + 1))
    return unseen / n, (
        f"{once} images fell to one attack only and {twice} to two, from which about {unseen:.0f} more are expected "
        "to fall to further attacks of these kinds"
    )


def _margins(fallen: Fallen, robust: np.ndarray) -> tuple[float, str] | None:
    """How near the images that are left came to falling, against what the last gradient attack gained on them."""
    measured = [row.margins for row, _ in fallen if row.margins is not None and row.health is not None]
    if len(measured) < 2:
        return None
    before = np.minimum.reduce(measured[:-1])[robust]
    last = measured[-1][robust]
    nearest = np.minimum(before, last)
    gained = np.maximum(before - last, 0)
    if not np.isfinite(nearest).all():
        return None
    # the chance that as much is gained once more as is still missing, over what was gained on any image
    chance = (gained[None, :] >= np.maximum(nearest, 1e-12)[:, None]).mean(1)
    points = float(chance.sum() / len(robust))
    return points, (
        "on the images that are left, the logit of the true class leads the next one by "
        f"{float(np.median(nearest)):.2g} in the median; the last attack by gradients lowered this lead by "
        f"{float(np.median(gained)):.2g}"
    )


def _steps(evidence: Evidence, robust: np.ndarray) -> tuple[float, str] | None:
    """Whether more steps still find more; without gradients none can."""
    if evidence.probes is None or evidence.blind():
        return None
    (a, before), (b, after) = evidence.probes.steps[-2:]
    gain = max(0.0, before - after)
    # one image more or less is luck
    gains = gain * evidence.probes.n >= 1.5
    means = "further steps still find more" if gains else "further steps find hardly more"
    return (
        gain * float(robust.mean()) if gains else 0.0,
        f"a short PGD leaves {100 * before:.0f} % after {a:.0f} steps and {100 * after:.0f} % after {b:.0f}: {means}",
    )
