"""Three data classes: the evidence for the alarms, the finding of an alarm, and the outlook.

The evidence consists of the results of attacks and probes. The outlook is an estimate of how much another attack would
lower the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..rows import Row
from .answers import Missing
from .probes import Probes

Verdict = Literal["passed", "noted", "unreliable", "not asked"]

#: The report's words for each reason why gradients could not be used.
MISSING: dict[Missing, str] = {
    "not finite": "logits or gradients are not finite",
    "no gradient": "there is no gradient: PyTorch has no derivative of the output with respect to the images",
    "zero gradient": "the gradient is zero everywhere",
}

#: Class names of the surrogates in which a purifier has the gradient of the identity, as in BPDA.
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
        verdict: "passed": there is no reason to doubt the robust accuracy. "noted": worth knowing, but no reason for
            doubt. "unreliable": a reason for doubt. "not asked": nothing was measured that could tell.
        measured: the measurements, in words.
        row: the name of the attack, or of the probe, that shows the sign.
        model: the model's name.
        of_answers: whether the alarm is about missing or inconsistent predictions. Fallen images are then doubtful too,
            so that the accuracy is doubtful even at 0 %.
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
        """The finding in a sentence, with the attack or the probe that shows it."""
        return f"{self.alarm}: {self.measured}" + (f" ({self.row})" if self.row else "")


@dataclass(frozen=True)
class Evidence:
    """The evidence about one model, which the alarms judge.

    Args:
        rows: the clean rows and the rows of attacks, in the order in which they were made, without ``worst`` rows.
        probes: the measurements of the probes; None if there were no probes.
        classes: number of the model's classes; None if unknown.
        probabilities: whether the model returns probabilities instead of logits; None if unknown.
        one_hot: whether these probabilities are all 0 or 1.
        protocol: name of the protocol; None for a list of attacks.
    """

    rows: Sequence[Row]
    probes: Probes | None = None
    classes: int | None = None
    probabilities: bool | None = None
    one_hot: bool = False
    protocol: str | None = None

    def attacks(self) -> list[Row]:
        """The attacks in the report's threat model that were judged on the deployed model."""
        return [row for row in self.rows if row.is_attack and row.threat is None and row.deployed]

    def with_counted_gradients(self) -> list[Row]:
        """The attacks that used the model's own gradients and counted them."""
        return [row for row in self.attacks() if row.health is not None and row.own_gradients]

    def tried(self) -> set[str]:
        """The stronger attacks that ran, by their names in `purify_fast.evaluation.alarms.signs.EFFORTS`.

        An attack on only the few images with the smallest margins does not count.
        """
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
        """Tell whether every image has fallen to an attack or to a probe."""
        robust = self.robust(self.images)
        if robust is None:
            return False
        robust[self.fallen_to_probes] = False
        return not robust.any()

    @property
    def fallen_to_probes(self) -> list[int]:
        """The numbers of the images that withstood every attack but fell to a probe."""
        return [] if self.probes is None else self.probes.fallen()

    def blind(self) -> str:
        """The reason why short attacks with the model's gradients could not succeed; empty if there is no such reason.

        Such a reason is that the gradients are missing or unusable.
        """
        counted = self.with_counted_gradients()
        if self.probes is not None and isinstance(self.probes.cosine, str):
            return MISSING[self.probes.cosine]
        lacked = bool(counted) and all(row.lacked_gradients for row in counted)
        return f"the attacks had no usable gradients ({counted[0].describe_health()})" if lacked else ""

    def robust(self, n: int) -> np.ndarray | None:
        """Tell which of the first n images withstood all attacks on at least n images; None without such an attack."""
        masks = [row.robust[:n] for row in self.attacks() if row.n >= n]
        return np.logical_and.reduce(masks) if masks else None

    def fallen(self) -> list[tuple[Row, np.ndarray]]:
        """Return each attack with a mask, bool ``[n]``, which is True for the attacked images that fell to it."""
        clean = [row.robust for row in self.rows if row.kind == "clean" and row.deployed]
        right = clean[0] if clean else np.ones(self.images, dtype=bool)
        left, fallen = right.copy(), []
        for row in self.attacks():
            given = left if row.of_survivors else right
            fallen.append((row, given[: row.n] & ~row.robust))
            left[: row.n] &= row.robust
        return fallen


# -- the outlook ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """An estimate of how much one more attack of the same kinds would lower the accuracy.

    Args:
        points: the expected loss of accuracy, between 0 and 1; the largest of several estimates.
        sentences: the estimates, in words.
        model: the model's name.
    """

    points: float
    sentences: tuple[str, ...]
    model: str = ""


def outlook(evidence: Evidence) -> Outlook | None:
    """Estimate how much one more attack would find, from the attacks on all images.

    Args:
        evidence: rows and probes of the model.

    Returns:
        The estimate; None if there was no attack on all images, or if every image fell.
    """
    full = evidence.images
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
    left[evidence.fallen_to_probes] = False
    text = (
        f"by this estimate, one more attack of these kinds would lower the accuracy of {100 * robust.mean():.1f} % by "
        f"about {100 * points:.1f} points"
    )
    taken, asked = int(robust.sum() - left.sum()), 0 if evidence.probes is None else evidence.probes.n
    if taken:
        # Some images withstood every attack but fell to the probes, so the attacks are no basis for an estimate. The
        # probes are expected to find the same share among all remaining images.
        among = int(robust[:asked].sum())
        points = taken / among * float(left.mean())
        text = (
            f"{among} of the first {asked} images withstood the attacks, but {taken} of these fell to the probes, so "
            "the attacks alone cannot say how many more images would fall"
        )
    return Outlook(points, (text, *(sentence for _, sentence in known)))


Fallen = Sequence[tuple[Row, np.ndarray]]


def _last_gain(fallen: Fallen, n: int) -> tuple[float, str]:
    """Return the share of images that only the last attack found; 0 if this attack is the first of its kind."""
    row, mask = fallen[-1]
    if len(fallen) == 1:
        return 0.0, f"only one attack ran ({row.attack}), so there is no estimate of what another attack would find"
    gain = int((mask & ~np.logical_or.reduce([m for _, m in fallen[:-1]])).sum())
    text = f"the last attack ({row.attack}) found {gain} image{'' if gain == 1 else 's'} that no other attack found"
    # Two attacks are of the same kind if attack and loss are the same, also with other random starts or steps.
    kinds = [(each.kind, each.settings.get("loss")) for each, _ in fallen]
    if kinds[-1] not in kinds[:-1]:
        return 0.0, f"{text}; it was the first of its kind, so this says nothing about another attack of this kind"
    return gain / n, text


def _unseen(fallen: Fallen, n: int) -> tuple[float, str] | None:
    """Estimate how many more images would fall to further attacks.

    The estimate is Chao's lower bound (1984), f1 (f1 - 1) / (2 (f2 + 1)), where f1 images were found by exactly one
    attack, and f2 images by exactly two attacks.
    """
    whole = [(row, mask) for row, mask in fallen if not row.of_survivors]
    if len(whole) < 3:
        return None
    times = np.sum([mask for _, mask in whole], 0)
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    unseen = once * (once - 1) / (2 * (twice + 1))
    return unseen / n, (
        f"{once} images fell to one attack only and {twice} to two; by these counts, about {unseen:.0f} more would "
        "fall to further attacks of these kinds"
    )


def _margins(fallen: Fallen, robust: np.ndarray) -> tuple[float, str] | None:
    """Estimate the gain of one more attack from the margins of the remaining images.

    The margins are compared with their decrease by the last attack with gradients.
    """
    measured = [row.margins for row, _ in fallen if row.margins is not None and row.health is not None]
    if len(measured) < 2:
        return None
    before = np.minimum.reduce(measured[:-1])[robust]
    last = measured[-1][robust]
    nearest = np.minimum(before, last)
    gained = np.maximum(before - last, 0)
    if not np.isfinite(nearest).all():
        return None
    # For each image, the probability that one more attack lowers its margin to 0 is estimated by a share of images:
    # those on which the last attack lowered the margin by at least this image's margin.
    chance = (gained[None, :] >= np.maximum(nearest, 1e-12)[:, None]).mean(1)
    points = float(chance.sum() / len(robust))
    return points, (
        "on the images that are left, the true logit is larger than every other logit by "
        f"{float(np.median(nearest)):.2g} in the median; the last attack with gradients lowered this difference by "
        f"{float(np.median(gained)):.2g}"
    )


def _steps(evidence: Evidence, robust: np.ndarray) -> tuple[float, str] | None:
    """Estimate the gain of more steps from the probes; None without probes or without usable gradients."""
    if evidence.probes is None or evidence.blind():
        return None
    (a, before), (b, after) = evidence.probes.steps[-2:]
    gain = max(0.0, before - after)
    # A difference of a single image may be chance.
    gains = gain * evidence.probes.n >= 1.5
    means = "further steps still find more" if gains else "further steps find hardly any more"
    return (
        gain * float(robust.mean()) if gains else 0.0,
        f"a short PGD leaves {100 * before:.0f} % after {a:.0f} steps and {100 * after:.0f} % after {b:.0f}: {means}",
    )
