"""A row of a report: the outcome of one attack for each image, or the worst outcome over several attacks.

All numbers of a row, and their errors, are computed from its predictions ``right [K, n]``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...attacks import GradientHealth
from ..estimates import Estimate, exact_interval, in_percent

#: The fields of a row that describe the outcome of its attack.
RESULTS = ("attacked", "unsearched", "may_hold", "last_fallen", "warnings", "doubts", "fell_to_probes")
#: The fields that are arrays, and that only a file of the cache has.
ARRAYS = ("margins", "fallen", "fallen_images")
#: The warning of an attack that ran out of time.
CUT = "runs ended before their last step, because the time was over"


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
        health = GradientHealth(dict(self.health or {}))
        percent = [100 * share for share in (health.nonfinite, health.zero, health.unmoved)]
        shares = [f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %" for share in percent]
        return shares if health.count("images") else [*shares[:2], "-"]


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


def _bits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values)
