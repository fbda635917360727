"""A row of a report: the outcome of one attack for each image, or the worst outcome over several attacks.

All numbers of a row, their errors, and the test of a claim are computed from its predictions ``right [K, n]``.
"""

from __future__ import annotations

import bisect
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

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
#: A row shows that images share draws if its mean square over draws exceeds that of the rest at this level of
#: significance.
SHARED = 0.01
#: A claim about a model whose images share draws is tested with at least this number of draws: with fewer, a skewed
#: draw makes more errors than `REFUTED` (simulated: 7 % with 10 draws, 2 % with 20).
CLAIM_DRAWS = 50


class Estimate(NamedTuple):
    """An accuracy with its standard error, the degrees of freedom of the error, and whether images share draws."""

    mean: float
    error: float
    freedom: float
    shared: bool

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of an accuracy between 0 and 1, by the t distribution of the logarithm of its odds.

        Near 0 and 1, accuracies are skewed, and their odds are less so.
        """
        odds = math.log(self.mean / (1 - self.mean))
        half = t_quantile(0.975, self.freedom) * self.error / (self.mean * (1 - self.mean))
        return 1 / (1 + math.exp(half - odds)), 1 / (1 + math.exp(-half - odds))

    @classmethod
    def of(cls, right: np.ndarray) -> Estimate:
        """Estimate the mean of ``right [K, n]``, in which K draws and n images are random samples.

        These are the components of variance of a two-way table without repetition, with the degrees of freedom of
        Satterthwaite (Biometrics Bulletin 1946). Whether a model draws for each image, once for all images of a call,
        or both, need not be known.
        """
        k, n = right.shape
        values = right.astype(np.float64)
        mean, of_images, of_draws = values.mean(), values.mean(0), values.mean(1)
        rest = values - of_images - of_draws[:, None] + mean
        freedom = max(1, n - 1), max(1, k - 1), max(1, n - 1) * max(1, k - 1)
        sums = k * np.square(of_images - mean).sum(), n * np.square(of_draws - mean).sum(), np.square(rest).sum()
        images, draws, residual = (total / free for total, free in zip(sums, freedom, strict=True))
        squares = np.array([images, draws, -residual]) if draws > residual else np.array([images, 0.0, 0.0])
        total = float(squares.sum())
        spread = float((np.square(squares) / freedom).sum())
        free = total**2 / spread if spread else float(freedom[0])
        # Wilson and Hilferty's quantile of the chi-squared distribution; the rest has many degrees of freedom.
        ninth = 2 / (9 * freedom[1])
        limit = (1 - ninth + statistics.NormalDist().inv_cdf(1 - SHARED) * math.sqrt(ninth)) ** 3
        return cls(float(mean), math.sqrt(max(0.0, total) / (n * k)), free, bool(draws > limit * residual))


def t_quantile(level: float, freedom: float) -> float:
    """Return a quantile of Student's t distribution, exact to a third of a percent from 4 degrees of freedom on.

    The expansion of Cornish and Fisher (Abramowitz & Stegun 26.7.5).
    """
    z = statistics.NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


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
        right: whether each of K predictions of each image (clean, or after the attack) is correct, bool ``[K, n]``. A
            row of an attack on survivors, and a ``worst`` row, also count what fell in earlier rows; for a random model
            see `Points`. A draw has the same index in all rows.
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
        wrong: for a random model: the share of the choosing draws that misclassify each image, float64 ``[n]``;
            otherwise None. Choosing draws choose between points, and are not among the predictions.
        shares_draws: whether predictions of a call were found to have a random part in common.
    """

    model: str
    attack: str
    kind: str
    right: np.ndarray
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
    wrong: np.ndarray | None = field(default=None, compare=False)
    shares_draws: bool = False

    def __repr__(self) -> str:
        percent = f"{self.in_percent} %" if self.n else "no images"
        return f"Row({self.model!r}, {self.attack!r}, {percent}, n = {self.n})"

    @property
    def n(self) -> int:
        """The number of the row's images."""
        return self.right.shape[1]

    @property
    def n_eval(self) -> int:
        """The number of predictions that judged each image."""
        return len(self.right)

    @property
    def robust(self) -> np.ndarray:
        """The images on which all predictions are correct, bool ``[n]``."""
        return np.asarray(self.right.all(0))

    @property
    def accuracy(self) -> float:
        """The share of robust images."""
        return float(self.robust.mean())

    @property
    def estimate(self) -> Estimate:
        """The accuracy of a single prediction, with its standard error over images and draws."""
        return Estimate.of(self.right)

    @property
    def mean(self) -> float:
        """The accuracy of a single prediction: the mean over the images and over the ``n_eval`` predictions."""
        return float(self.right.mean())

    @property
    def mean_error(self) -> float:
        """The standard error of `mean`, over images and draws, see `Estimate`."""
        return self.standard_error if self.n_eval == 1 else self.estimate.error

    @property
    def mean_interval(self) -> tuple[float, float]:
        """The 95 % interval of `mean`, from 0 to 1. It is exact if all predictions of an image have one outcome."""
        estimate = self.estimate
        if self.n_eval == 1 or estimate.error == 0:
            return exact_interval(round(self.mean * self.n), self.n)
        return estimate.interval

    @property
    def images_share_draws(self) -> bool:
        """Return True if the images' predictions have a random part in common, by a test of the model or by the row."""
        return self.n_eval > 1 and (self.shares_draws or self.estimate.shared)

    @property
    def share_wrong(self) -> np.ndarray:
        """How surely each image has fallen, from 0 to 1, ``[n]``: ``wrong``, or 1 for images that are not robust."""
        return (~self.robust).astype(float) if self.wrong is None else self.wrong

    @property
    def standard_error(self) -> float:
        """The binomial standard error of the accuracy p: sqrt(p (1 - p) / n); NaN if images share draws.

        If they do, the draws are a single sample of the event that all of them are right.
        """
        return math.nan if self.images_share_draws else math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The exact 95 % interval of the accuracy on all images like these, from 0 to 1; None if images share draws."""
        return None if self.images_share_draws else exact_interval(int(self.robust.sum()), self.n)

    @property
    def in_percent(self) -> str:
        """The accuracy in percent, with its `interval`."""
        return in_percent(self.accuracy, self.interval)

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

    @property
    def points(self) -> Points:
        """The points of the row's images."""
        margins = np.full(self.n, np.inf, dtype=np.float32) if self.margins is None else self.margins
        return Points(self.share_wrong, margins, self.right)

    def take(self, points: Points) -> None:
        """Let the row count these points, one for each image. Only a random model's row keeps how they were chosen."""
        self.right, self.margins = points.right, points.margins
        self.wrong = None if self.wrong is None else points.wrong

    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays that `to_dict` does not contain, by name: those of `ARRAYS`, and examples."""
        return {name: getattr(self, name) for name in ARRAYS} | ({} if self.examples is None else vars(self.examples))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with predictions as strings of 0 and 1, and without `arrays`."""
        apart = ("right", "wrong", "examples", *ARRAYS)
        values = {name: value for name, value in vars(self).items() if name not in apart}
        error = self.standard_error
        values |= {"n": self.n, "n_eval": self.n_eval, "accuracy": self.accuracy}
        values["standard_error"] = None if math.isnan(error) else error
        if self.n_eval > 1:
            values |= {"mean": self.mean, "mean_error": self.mean_error, "right": [*map(_bits, self.right)]}
        if self.wrong is not None:
            values["wrong"] = self.wrong.tolist()
        return values | {"robust": _bits(self.robust)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> Row:
        """Make a row from the result of `to_dict`, and from those `arrays` that are not None."""
        # Reports of earlier versions have counts of runs, ``fell_to``, and of proofs, ``proved``, and name a
        # ``variant`` of the model. A row on a model without its noise counted in no headline, so it is refused.
        if values.get("variant") in ("fixed", "deterministic") or values["kind"] == "authors":
            raise ValueError(f"the row {values['attack']!r} judged another model than the deployed one: evaluate again")
        derived = ("n", "n_eval", "robust", "accuracy", "standard_error", "mean", "mean_error")
        earlier = ("fell_to", "proved", "variant", "of_draws")
        fields = {name: value for name, value in values.items() if name not in (*derived, *earlier)}
        draws = values.get("right", [values["robust"]])
        if not all(isinstance(draw, str) for draw in draws):
            raise ValueError(f"the row {values['attack']!r} has numbers of right draws only: evaluate again")
        fields["right"] = np.array([[bit == "1" for bit in draw] for draw in draws], dtype=bool)
        fields["wrong"] = np.array(values["wrong"], dtype=np.float64) if "wrong" in values else None
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


class Points(NamedTuple):
    """A point of each image, and what decides between points: ``[n]``, and ``right [K, n]``, see `Row`.

    The choosing draws alone decide which of two points is worse; of a deterministic model, its only prediction.
    """

    wrong: np.ndarray
    margins: np.ndarray
    right: np.ndarray

    @classmethod
    def worst(cls, rows: Iterable[Row], n: int) -> Points:
        """For each of the first n images, the worst point of several rows, of which the first has all n images."""
        return functools.reduce(cls.or_worse, [row.points.at(slice(n)) for row in rows])

    def at(self, index: Any) -> Points:
        """The points of some images, by a slice or an index."""
        return Points(*(array[..., index] for array in self))

    def put(self, index: Any, points: Points) -> Points:
        """A copy with other points of the images at an index."""
        copy = Points(*(array.copy() for array in self))
        for array, new in zip(copy, points, strict=True):
            array[..., index] = new
        return copy

    def is_worse(self, than: Points) -> np.ndarray:
        """Tell which points are worse than other points, bool ``[n]``."""
        return (self.wrong > than.wrong) | ((self.wrong == than.wrong) & (self.margins < than.margins))

    def or_worse(self, other: Points) -> Points:
        """For each image the worse of two points; of equally bad points the first. ``other`` may have fewer images."""
        which = np.flatnonzero(other.is_worse(self.at(slice(len(other.wrong)))))
        return self.put(which, other.at(which))


def worst_rows(rows: Sequence[Row], probed: Row | None = None) -> list[Row]:
    """Make the rows over several attacks, in which an image is robust if it is robust in all of their rows.

    ``probed`` is the column of the probes, which counts in the report's threat model.
    """
    attacks, clean = [row for row in rows if row.is_attack], [row for row in rows if row.kind == "clean"]
    worst = []
    for threat in dict.fromkeys([None, *(row.threat for row in attacks)]):
        within = [row for row in attacks if row.threat == threat]
        sizes = {row.n for row in within if threat is None or len(within) > 1}
        for n in sorted(sizes, reverse=True):
            label = "worst" + (f", {threat}" if threat else "")
            label += "" if n == max(row.n for row in rows) else f", first {n}"
            group = [row for row in within if row.n >= n]
            worst.append(_row(label, group, n, clean, probed if threat is None else None))
    return worst


def _row(label: str, group: Sequence[Row], n: int, clean: Sequence[Row], probed: Row | None) -> Row:
    """Make a row over the attacks ``group`` and the probes, on the first n images; ``clean`` has the clean row."""
    first, attacked = group[0], [row for row in group if row.attacked]
    # The row is reliable if the model's own gradients were usable in at least one attack, because further attacks can
    # only lower the accuracy. Transferred images say nothing about these gradients.
    had_gradients = any(row.reliable and row.health is not None for row in attacked if row.own_gradients)
    worst = Row(
        model=first.model,
        attack=label,
        kind="worst",
        right=first.right[:, :n],
        seed=first.seed,
        seconds=sum(row.seconds for row in group),
        data=first.data,
        settings={"over": [row.attack for row in group]},
        deterministic=first.deterministic,
        attacked=max(row.attacked or 0 for row in group),
        threat=first.threat,
        nonfinite_predictions=min(sum(row.nonfinite_predictions for row in group), n * first.n_eval),
        shares_draws=first.shares_draws,
        wrong=first.wrong,
    )
    points = Points.worst([*clean, *group], n)
    if probed is not None:
        probes = probed.points.at(slice(n))
        worst.fell_to_probes = int(probes.is_worse(points).sum())
        points = points.or_worse(probes)
    worst.take(points)
    # Missing gradients are no reason for doubt if no image was attacked, or if every image fell.
    worst.reliable = not attacked or had_gradients or bool((worst.share_wrong == 1).all())
    return worst


# -- the test of a claim ----------------------------------------------------------------------------------------------


def chance_of_at_most(left: int, images: int, share: float) -> float:
    """Return the probability that at most ``left`` images are robust, by the exact binomial distribution."""
    if left >= images or share == 0:
        return 1.0
    return 0.0 if share == 1 else float(binomial(images, share)[: left + 1].sum())


def binomial(draws: int, share: float) -> np.ndarray:
    """The probabilities of 0 to ``draws`` successes if each has the probability ``share`` in (0, 1), float64."""
    k, n = torch.arange(draws + 1, dtype=torch.float64, device="cpu"), torch.tensor(float(draws), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    mass = (ways + k * math.log(share) + (n - k) * math.log1p(-share)).exp()
    return np.asarray((mass / mass.sum()).numpy(), dtype=np.float64)


@functools.cache
def least_share(missed: int, images: int) -> float:
    """Return the least share of right images, in millionths, by which 2.5 % or more of samples miss at most so many."""
    return bisect.bisect_left(range(10**6), 0.025, key=lambda k: chance_of_at_most(missed, images, 1 - k / 1e6)) / 1e6


def exact_interval(right: int, images: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper-Pearson), from 0 to 1."""
    return least_share(images - right, images), 1 - least_share(right, images)


def in_percent(share: float, interval: tuple[float, float] | None) -> str:
    """A share in percent, such as ``50.0 (35.0 to 65.0)``."""
    within = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * share:.1f}{within}"


def _bits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values)


@dataclass(frozen=True)
class ClaimTest:
    """The result of the test if a row refutes a claimed robust accuracy.

    A random model is tested by the accuracy of one draw. ``chance`` is the probability of at most ``left`` robust
    images if the claim is true: the mean over several draws of each image varies less than a single draw, so the
    binomial test of the rounded up number is cautious. If images share draws, the accuracy must also be below the claim
    in a t test with the `Estimate` of the row; ``bound`` is then the largest accuracy that it leaves at the level
    `REFUTED`. ``reason`` tells why nothing was tested.
    """

    verdict: Literal["refuted", "not refuted", "not tested"]
    claim: float
    share: float
    left: int
    images: int
    chance: float
    bound: float | None = None
    reason: str = ""


def judge_claim(claim: float, row: Row, clean: Row | None) -> ClaimTest:
    """Test a claimed robust accuracy."""
    left = math.ceil(row.mean * row.n - 1e-9)
    chance, bound, reason = chance_of_at_most(left, row.n, claim), None, ""
    refuted = chance < REFUTED
    # Predictions without a class must not refute a claim, so they are also counted as right.
    nameless = math.ceil(row.nonfinite_predictions / row.n_eval)
    by_names = chance_of_at_most(min(row.n, left + nameless), row.n, claim) < REFUTED
    if row.nothing_to_attack or (clean is not None and clean.nonfinite_predictions) or by_names != refuted:
        reason = "the model fails without an attack already, or too many of its predictions name no class"
    elif row.images_share_draws:
        estimate = row.estimate
        bound = min(1.0, estimate.mean + t_quantile(1 - REFUTED, estimate.freedom) * estimate.error)
        refuted = refuted and bound < claim
        if row.n_eval < CLAIM_DRAWS:
            reason = f"images share draws, so the test needs n_eval={CLAIM_DRAWS} predictions of each, got {row.n_eval}"
    verdict: Literal["refuted", "not refuted", "not tested"] = "refuted" if refuted else "not refuted"
    verdict = "not tested" if reason else verdict
    return ClaimTest(verdict, claim, row.mean, left, images=row.n, chance=chance, bound=bound, reason=reason)
