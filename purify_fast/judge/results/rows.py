"""A row of a report: the outcome of one attack for each image, or the worst outcome over several attacks.

A row can also refute a claimed robust accuracy.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from ...attacks import GradientHealth

#: The fields of a row that describe the outcome of its attack.
RESULTS = ("attacked", "unsearched", "may_hold", "last_fallen", "warnings", "doubts", "fell_to_probes")
#: The fields that are arrays, and that only a file of the cache has.
ARRAYS = ("margins", "fallen", "fallen_images")
#: The warning of an attack that ran out of time.
CUT = "runs ended before their last step, because the time was over"
#: A claim is refuted if the measured accuracy would be too improbable under it: if the claim were true, an accuracy of
#: at most the measured accuracy would have a probability below this number.
REFUTED = 0.01


@dataclass
class Examples:
    """A few attacked images.

    Args:
        clean: the images before the attack, float32 ``[M, C, H, W]`` in [0, 1].
        adversarial: the images after the attack, float32 ``[M, C, H, W]``.
        labels: the true classes, int64 ``[M]``.
        fell: True for images that fell to the attack, bool ``[M]``.
        predicted: the predicted classes after the attack, int64 ``[M]``; wrong for a fallen image, -1 without a class.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    fell: np.ndarray
    predicted: np.ndarray


@dataclass(repr=False)
class Row:
    """The outcome of one attack on one model.

    Args:
        model: the model's name.
        attack: the attack's name, which identifies the row together with the model's name.
        kind: ``clean``; the kind of the attack; or ``worst``, for the worst outcome over several attacks.
        robust: bool ``[n]``. All ``n_eval`` predictions on the row's image (clean, or after the attack) were correct.
            In a row of an attack on survivors, and in a ``worst`` row, an image is robust only if it was robust in the
            earlier rows too; a random model has another rule, see `by_worst_points`.
        n_eval: number of predictions that judged each image.
        seed: seed of all random numbers.
        seconds: wall clock time.
        data: a hash of the images and labels.
        health: counts of `GradientHealth` (``gradients nonfinite zero images unmoved``); None if nothing was counted.
        reliable: whether the attack had usable gradients, or no image withstood it. If not, the true accuracy may be
            lower. An alarm's doubt also makes a ``worst`` row unreliable.
        settings: the options of the attack and of its `AttackSpec` as plain values; for several attacks, their names.
        deterministic: whether two predictions of the model are equal; None if unknown.
        attacked: number of images that the attack got; None in a clean row.
        may_end_early: whether a search may have ended before its last step.
        unsearched: number of images that the attack got but did not reach, because it stopped before.
        may_hold: the largest number of unsearched images that would fall, with 95 % confidence.
        last_fallen: number of images that fell in the last group of an attack on the nearest images.
        warnings: warnings of the attack for the reader of the report.
        doubts: names of the alarms that make a ``worst`` row doubtful.
        fell_to_probes: number of images of a ``worst`` row that fell to a probe; None without probes.
        threat: the threat model, such as ``L2 0.5``; None for the report's. A row with another threat model counts only
            for the ``worst`` row of that threat model, and never for the headline.
        transferred: whether the images were found on another model than the judged model, or with another model's
            gradients. Another aggregation of samples makes no other model.
        uses_gradients: whether the attack follows gradients, see `purify_fast.attacks.Attack.uses_gradients`.
        nonfinite_predictions: number of predictions without a class, because of NaN or of several infinite largest
            logits; they count as wrong.
        examples: some attacked images, for the pictures.
        fallen: the indices of the images whose attacked images a prediction misclassified, int64 ``[F]``, and
            ``fallen_images`` these attacked images, float32 ``[F, C, H, W]``; None in a report.
        margins: the true logit minus the largest other logit on the attacked images, averaged over the (choosing)
            draws, float32 ``[n]``. None in a ``worst`` row, and in the clean row of a deterministic model.
        right: the number of correct predictions on each image, int64 ``[n]``; None if each image has one prediction.
        wrong: for a random model: the share of the choosing draws that misclassify each image, float64 ``[n]``;
            otherwise None. Choosing draws choose between points, and are not among the predictions.
        of_draws: for a model that draws once per call: the accuracy of each prediction, for the standard error.
    """

    model: str
    attack: str
    kind: str
    robust: np.ndarray
    n_eval: int
    seed: int
    data: str
    seconds: float = 0.0
    health: dict[str, int] | None = None
    reliable: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    deterministic: bool | None = None
    attacked: int | None = None
    may_end_early: bool = False
    unsearched: int = 0
    may_hold: float = 0.0
    last_fallen: int = 0
    warnings: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    fell_to_probes: int | None = None
    threat: str | None = None
    transferred: bool = False
    uses_gradients: bool = True
    nonfinite_predictions: int = 0
    examples: Examples | None = field(default=None, compare=False)
    fallen: np.ndarray | None = field(default=None, compare=False)
    fallen_images: np.ndarray | None = field(default=None, compare=False)
    margins: np.ndarray | None = field(default=None, compare=False)
    right: np.ndarray | None = field(default=None, compare=False)
    wrong: np.ndarray | None = field(default=None, compare=False)
    of_draws: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        percent = f"{self.in_percent} %" if self.n else "no images"
        return f"Row({self.model!r}, {self.attack!r}, {percent}, n = {self.n})"

    @property
    def n(self) -> int:
        """The number of the row's images."""
        return len(self.robust)

    @property
    def accuracy(self) -> float:
        """The share of robust images."""
        return float(self.robust.mean())

    @property
    def mean(self) -> float:
        """The accuracy of a single prediction: the mean over the images and over the ``n_eval`` predictions."""
        return self.accuracy if self.right is None else float(self.right.mean()) / self.n_eval

    @property
    def mean_error(self) -> float:
        """The standard error of `mean`, over images and draws.

        The standard deviation of the images' shares of correct predictions contains both. If the model draws once for
        all images, the variance over the draws is added.
        """
        if self.right is None:
            return self.standard_error
        variance = float(np.var(self.right / self.n_eval)) / self.n
        if len(self.of_draws) > 1:
            variance += float(np.var(self.of_draws, ddof=1)) / len(self.of_draws)
        return math.sqrt(variance)

    @property
    def share_wrong(self) -> np.ndarray:
        """How surely each image has fallen, from 0 to 1, ``[n]``: ``wrong``, or 1 for images that are not robust."""
        return (~self.robust).astype(float) if self.wrong is None else self.wrong

    @property
    def standard_error(self) -> float:
        """The binomial standard error of the accuracy p: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval of the accuracy on all images like these (Clopper-Pearson), from 0 to 1."""
        right = int(self.robust.sum())
        return least_share(self.n - right, self.n), 1 - least_share(right, self.n)

    @property
    def in_percent(self) -> str:
        """The accuracy in percent; with its `interval`, or its standard error if an image has several predictions."""
        if self.right is not None:
            return f"{100 * self.accuracy:.1f} ± {100 * self.standard_error:.1f}"
        accuracy, low, high = (100 * share for share in (self.accuracy, *self.interval))
        return f"{accuracy:.1f} ({low:.1f} to {high:.1f})"

    @property
    def own_gradients(self) -> bool:
        """Return True if the attack used gradients of the judged model, with any aggregation of its samples."""
        return not self.transferred and self.uses_gradients

    @property
    def lacked_gradients(self) -> bool:
        """Return True if the counts show that the attack's gradients were not usable."""
        return self.health is not None and not GradientHealth(dict(self.health)).reliable

    @property
    def is_attack(self) -> bool:
        """Return True if this is a row of a single attack, not of the kind ``clean`` or ``worst``."""
        return self.kind not in ("clean", "worst")

    @property
    def of_survivors(self) -> bool:
        """Return True if the attack got only images that no earlier attack had fooled."""
        return bool(self.settings.get("survivors_only"))

    @property
    def nothing_to_attack(self) -> bool:
        """Return True for a ``worst`` row without attacked images, because all clean images are misclassified."""
        return self.kind == "worst" and self.attacked == 0

    def count(self, points: Worst) -> None:
        """Let the row of a random model count these points, one for each image."""
        self.robust = points.right == self.n_eval
        self.right = points.right if self.n_eval > 1 else None
        self.wrong, self.margins = points.wrong, points.margins

    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays that `to_dict` does not contain, by name: those of `ARRAYS`, and examples."""
        return {name: getattr(self, name) for name in ARRAYS} | ({} if self.examples is None else vars(self.examples))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with ``robust`` as a string of 0 and 1, and without `arrays`."""
        apart = ("robust", "right", "wrong", "examples", *ARRAYS)
        values = {name: value for name, value in vars(self).items() if name not in apart}
        values |= {"n": self.n, "accuracy": self.accuracy, "standard_error": self.standard_error}
        if self.right is not None:
            values |= {"mean": self.mean, "mean_error": self.mean_error, "right": self.right.tolist()}
        if self.wrong is not None:
            values["wrong"] = self.wrong.tolist()
        return values | {"robust": "".join("1" if right else "0" for right in self.robust)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> Row:
        """Make a row from the result of `to_dict`, and from those `arrays` that are not None."""
        # Reports of earlier versions have counts of runs, ``fell_to``, and of proofs, ``proved``, and name a
        # ``variant`` of the model. A row on a model without its noise counted in no headline, so it is refused.
        if values.get("variant") in ("fixed", "deterministic") or values["kind"] == "authors":
            raise ValueError(f"the row {values['attack']!r} judged another model than the deployed one: evaluate again")
        derived = ("n", "accuracy", "standard_error", "mean", "mean_error", "fell_to", "proved", "variant")
        kinds = {"right": np.int64, "wrong": np.float64}
        fields = {name: value for name, value in values.items() if name not in derived}
        fields["robust"] = np.array([character == "1" for character in values["robust"]], dtype=bool)
        fields |= {name: np.array(fields[name], dtype=kind) for name, kind in kinds.items() if name in fields}
        rest = dict(arrays or {})
        fields |= {name: rest.pop(name, None) for name in ARRAYS}
        return cls(**fields, examples=Examples(**rest) if rest else None)

    @property
    def shown(self) -> dict[str, Any]:
        """The settings and the results of the attack that the report's page shows, without empty results."""
        results = {name.replace("_", " "): getattr(self, name) for name in RESULTS}
        return self.settings | {name: value for name, value in results.items() if value or name == "attacked"}

    def describe_health(self) -> str:
        """The shares of non-finite gradients, of zero gradients and of unmoved images, as a short text."""
        return "-" if self.health is None else " / ".join(self._shares())

    def health_in_words(self) -> str:
        """The shares of `describe_health` in words."""
        if self.health is None:
            return "the gradients were not counted"
        nonfinite, zero, unmoved = self._shares()
        moves = f", and {unmoved} of the images did not move" if unmoved != "-" else ""
        return f"{nonfinite} of the gradients are not finite, {zero} are zero{moves}"

    def _shares(self) -> list[str]:
        h, shares = self.health or {}, list[str]()
        for part, whole in (("nonfinite", "gradients"), ("zero", "gradients"), ("unmoved", "images")):
            share = 100 * h[part] / max(1, h[whole])
            shares.append(f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %")
        return shares if h["images"] else [*shares[:2], "-"]


@dataclass(frozen=True)
class Paired:
    """The difference of two accuracies on the same images.

    Args:
        difference: the difference, between -1 and 1.
        standard_error: standard error of the mean of the paired differences.
        n: number of images.
    """

    difference: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.standard_error:.1f} points (n = {self.n}, paired)"


class Worst(NamedTuple):
    """The worst known point of each image of a random model; every array is ``[n]``, see `Row`."""

    wrong: np.ndarray
    margins: np.ndarray
    right: np.ndarray

    @classmethod
    def of_row(cls, row: Row, n: int) -> Worst:
        """The points of a row's first n images."""
        margins = np.zeros(row.n, dtype=np.float32) if row.margins is None else row.margins
        right = row.robust.astype(np.int64) if row.right is None else row.right
        return cls(row.share_wrong[:n], margins[:n], right[:n])

    def is_worse(self, than: Worst) -> np.ndarray:
        """Tell which points are worse than other points, by the choosing draws alone, bool ``[n]``."""
        return (self.wrong > than.wrong) | ((self.wrong == than.wrong) & (self.margins < than.margins))

    def or_worse(self, other: Worst) -> Worst:
        """For each image the worse of two points; of equally bad points the first."""
        which = other.is_worse(self)
        return Worst(*(np.where(which, two, one) for one, two in zip(self, other, strict=True)))


def by_worst_points(rows: Sequence[Row], n: int) -> Worst:
    """For each of the first n images, choose the worst of the points that several rows handed over."""
    return functools.reduce(Worst.or_worse, [Worst.of_row(row, n) for row in rows])


def worst_rows(rows: Sequence[Row]) -> list[Row]:
    """Make the rows over several attacks, in which an image is robust if it is robust in all of their rows."""
    full = max(row.n for row in rows)
    attacks = [row for row in rows if row.is_attack]
    clean = [row for row in rows if row.kind == "clean" and row.wrong is not None]
    worst = []
    for threat in dict.fromkeys([None, *(row.threat for row in attacks)]):
        within = [row for row in attacks if row.threat == threat]
        if threat is None or len(within) > 1:
            name = "worst" if threat is None else f"worst, {threat}"
            for n in sorted({row.n for row in within}, reverse=True):
                label = name if n == full else f"{name}, first {n}"
                worst.append(_row(label, [row for row in within if row.n >= n], n, clean))
    return worst


def count_fallen(rows: Sequence[Row], fallen: Sequence[int], points: Worst | None = None) -> None:
    """Count the images that fell to probes in the ``worst`` rows."""
    images = np.asarray(fallen, dtype=np.int64)
    for row in rows:
        if row.kind == "worst" and row.threat is None:
            index = images[images < row.n]
            if points is None:
                row.robust = row.robust & ~np.isin(np.arange(row.n), index)
            else:
                worst = Worst.of_row(row, row.n)
                probed = Worst(*(array.copy() for array in worst))
                for array, new in zip(probed, points, strict=True):
                    array[index] = new[images < row.n]
                index = np.flatnonzero(probed.is_worse(worst))
                row.count(worst.or_worse(probed))
            row.reliable = row.reliable or bool((row.share_wrong == 1).all())
            row.fell_to_probes = len(index)


def _row(label: str, group: Sequence[Row], n: int, clean: Sequence[Row]) -> Row:
    """Make a row over the attacks ``group``, on the first n images; ``clean`` is the clean row of a random model."""
    first = group[0]
    robust = np.logical_and.reduce([row.robust[:n] for row in group])
    attacked = [row for row in group if row.attacked]
    # The row is reliable if the model's own gradients were usable in at least one attack, because further attacks can
    # only lower the accuracy. Transferred images say nothing about these gradients.
    had_gradients = any(row.reliable and row.health is not None for row in attacked if row.own_gradients)
    worst = Row(
        model=first.model,
        attack=label,
        kind="worst",
        robust=robust,
        n_eval=first.n_eval,
        seed=first.seed,
        seconds=sum(row.seconds for row in group),
        data=first.data,
        settings={"over": [row.attack for row in group]},
        deterministic=first.deterministic,
        attacked=max(row.attacked or 0 for row in group),
        threat=first.threat,
        nonfinite_predictions=min(sum(row.nonfinite_predictions for row in group), n * first.n_eval),
        # Draws that all images of a call share are the same in every row, so the first row shows how much they vary.
        of_draws=first.of_draws,
    )
    if first.wrong is not None:
        worst.count(by_worst_points([*clean, *group], n))
    # Missing gradients are no reason for doubt if no image was attacked, or if every image fell.
    worst.reliable = not attacked or had_gradients or bool((worst.share_wrong == 1).all())
    return worst


# -- the test of a claim ----------------------------------------------------------------------------------------------


def chance_of_at_most(left: int, images: int, share: float) -> float:
    """Return the probability that at most ``left`` images are robust, by the exact binomial distribution."""
    if left >= images or share == 0:
        return 1.0
    if share == 1:
        return 0.0
    first = math.lgamma(images + 1) + images * math.log1p(-share)
    odds = math.log(share) - math.log1p(-share)
    terms = (
        math.exp(first - math.lgamma(count + 1) - math.lgamma(images - count + 1) + count * odds)
        for count in range(left + 1)
    )
    return min(1.0, math.fsum(terms))


@functools.cache
def least_share(missed: int, images: int) -> float:
    """Return the least share of right images, in millionths, by which 2.5 % or more of samples miss at most so many."""
    return bisect.bisect_left(range(10**6), 0.025, key=lambda k: chance_of_at_most(missed, images, 1 - k / 1e6)) / 1e6


@dataclass(frozen=True)
class ClaimTest:
    """The result of the test if a row refutes a claimed robust accuracy.

    A random model is tested by the accuracy of one draw. The mean over several draws varies less than a single draw, so
    the binomial test of the rounded up number is cautious. ``chance`` is the probability of at most ``left`` robust
    images if the claim is true.
    """

    verdict: Literal["refuted", "not refuted", "not tested"]
    claim: float
    share: float
    left: int
    images: int
    chance: float


def judge_claim(claim: float, row: Row, clean: Row | None) -> ClaimTest:
    """Test a claimed robust accuracy."""
    share = row.mean
    if row.of_draws:
        # Draws that all images of a call share are not independent among the images. So the best draw is taken.
        share = min(1.0, share + max(row.of_draws) - sum(row.of_draws) / len(row.of_draws))
    left = math.ceil(share * row.n - 1e-9)
    chance = chance_of_at_most(left, row.n, claim)
    verdict: Literal["refuted", "not refuted", "not tested"] = "refuted" if chance < REFUTED else "not refuted"
    # Predictions without a class must not refute a claim, so they are also counted as right.
    nameless = math.ceil(row.nonfinite_predictions / row.n_eval)
    by_names = chance_of_at_most(min(row.n, left + nameless), row.n, claim) < REFUTED
    if row.nothing_to_attack or (clean is not None and clean.nonfinite_predictions) or by_names != (chance < REFUTED):
        verdict = "not tested"
    return ClaimTest(verdict, claim=claim, share=share, left=left, images=row.n, chance=chance)
