"""A row of a report: the outcome of one attack for each image, or the worst outcome over several attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..attacks import GradientHealth

#: The kinds of attacks that need no gradient.
GRADIENT_FREE = ("square", "branch_and_bound")
#: The report's words for the variants of a random model without randomness. These variants are measured, not deployed.
VARIANTS_APART = {"fixed": "fixed noise", "deterministic": "noise off"}
#: The key in `Report.curves` of the curve that shows the accuracy after all attacks over the radius.
CURVE = "eps, every attack"
#: The fields of a row that describe the outcome of its attack.
RESULTS = ("attacked", "fell_to", "unsearched", "may_hold", "proved", "warnings", "doubts", "fell_to_probes")
#: The kind of a row that repeats an evaluation by other authors.
AUTHORS = "authors"


@dataclass
class Examples:
    """A few attacked images.

    Args:
        clean: the images before the attack, float32 ``[M, C, H, W]`` in [0, 1].
        adversarial: the images after the attack, float32 ``[M, C, H, W]``.
        labels: the true classes, int64 ``[M]``.
        fell: True for images that fell to the attack, bool ``[M]``.
        predicted: the predicted classes after the attack, int64 ``[M]``; a wrong class for a fallen image, -1 for a
            prediction without a class.
        index: the indices of the images in the data, int64 ``[M]``, if every fallen image is kept; otherwise None.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    fell: np.ndarray
    predicted: np.ndarray
    index: np.ndarray | None = None

    def first(self, count: int) -> Examples:
        """Return the first ``count`` images, for the pictures."""
        arrays = {name: array[:count] for name, array in vars(self).items() if array is not None}
        return Examples(**arrays | {"index": None})


@dataclass(repr=False)
class Row:
    """The outcome of one attack on one model.

    Args:
        model: the model's name.
        attack: the attack's name, which identifies the row together with the model's name.
        kind: ``clean``; the kind of the attack; ``worst``, for the worst outcome over several attacks; or ``authors``,
            for a repeated evaluation by other authors, on their model.
        variant: the variant of the model that was judged. ``random``: the model as it is deployed, also if it draws no
            random numbers. ``fixed`` (noise) or ``deterministic``: a random model without randomness.
            `describe_variant` returns the report's words.
        robust: bool ``[n]``. In a clean row: the first prediction was correct. In an attack's row: the clean image was
            classified correctly, and all ``n_eval`` predictions on the adversarial image were correct.
        mean: accuracy of single predictions, averaged over the ``n_eval`` predictions. An image that was not
            attacked, because it was misclassified or had fallen before, counts with only wrong predictions. A row of
            kind ``worst`` has no predictions: its ``mean`` and ``worst`` equal its accuracy, and tables do not show
            them.
        worst: share of the images for which all ``n_eval`` predictions are correct.
        n_eval: number of predictions that judged each image.
        seed: seed of all random numbers.
        seconds: wall clock time.
        data: a hash of the images and labels.
        health: counts of `GradientHealth` (``gradients nonfinite zero images unmoved``); None if nothing was counted.
        reliable: whether the attack had usable gradients, or no image withstood it. If not, the true accuracy may be
            lower. A ``worst`` row is also unreliable if an alarm has raised a doubt.
        settings: the options of the attack and of its `AttackSpec` as plain values; in a row over several attacks, the
            names of these attacks.
        deterministic: whether two predictions of the model are equal; None if unknown.
        attacked: number of images that the attack got; None in a clean row.
        fell_to: a dict from the name of a run, such as "target 2, restart 1", to the number of images on which this run
            succeeded; empty for attacks without such counts.
        may_end_early: whether a search may have ended before its last step.
        unsearched: number of images that the attack got but did not reach, because it stopped before.
        may_hold: the largest number of unsearched images that would fall, with 95 % confidence.
        proved: number of images that a complete search proved robust.
        warnings: warnings of the attack for the reader of the report.
        doubts: names of the alarms that make a ``worst`` row doubtful.
        fell_to_probes: number of images of a ``worst`` row that fell to a probe; None without probes.
        threat: the threat model, such as ``L2 0.5``; None for the report's threat model. A row with another threat
            model counts only for the ``worst`` row of that threat model, and never for the headline.
        transferred: whether the images were found on another model than the judged model, or with another model's
            gradients. A model that differs only in the aggregation of its samples is not taken as another model.
        nonfinite_predictions: number of predictions without a class, because of NaN or of several infinite largest
            logits; they count as wrong.
        examples: some attacked images, for the pictures.
        margins: the true logit minus the largest other logit on the attacked images, averaged over the draws, float32
            ``[n]``; negative for misclassified images. None in a clean or ``worst`` row.
        points: best points of the images that withstood, while a curve over the radius is made; None afterwards.
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
    deterministic: bool | None = None
    attacked: int | None = None
    fell_to: dict[str, int] = field(default_factory=dict)
    may_end_early: bool = False
    unsearched: int = 0
    may_hold: float = 0.0
    proved: int = 0
    warnings: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    fell_to_probes: int | None = None
    threat: str | None = None
    transferred: bool = False
    nonfinite_predictions: int = 0
    examples: Examples | None = field(default=None, compare=False)
    margins: np.ndarray | None = field(default=None, compare=False)
    points: np.ndarray | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        percent = f"{100 * self.accuracy:.1f} ± {100 * self.standard_error:.1f} %" if self.n else "no images"
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
    def always_right(self) -> float:
        """The share of the images with only correct predictions, which is the criterion of every attack.

        In a clean row ``robust`` and ``accuracy`` use the first prediction, which decides if an image is attacked.
        """
        return self.worst if self.kind == "clean" else self.accuracy

    @property
    def standard_error(self) -> float:
        """The binomial standard error of the accuracy p: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def deployed(self) -> bool:
        """Tell whether the model was judged as it is deployed, and not in a variant without randomness."""
        return self.variant not in VARIANTS_APART

    @property
    def own_gradients(self) -> bool:
        """Tell whether the attack used gradients of the judged model, with any aggregation of its samples."""
        return not self.transferred and self.kind not in GRADIENT_FREE

    @property
    def lacked_gradients(self) -> bool:
        """Tell whether the counts show that the attack's gradients were not usable."""
        return self.health is not None and not GradientHealth(dict(self.health)).reliable

    @property
    def is_attack(self) -> bool:
        """Tell whether this is the row of a single attack, and not of the kind ``clean``, ``worst`` or ``authors``."""
        return self.kind not in ("clean", "worst", AUTHORS)

    @property
    def of_survivors(self) -> bool:
        """Tell whether the attack got only images that no earlier attack had fooled."""
        return bool(self.settings.get("survivors_only"))

    @property
    def nothing_to_attack(self) -> bool:
        """Tell whether this is a ``worst`` row without attacked images, because all clean images are misclassified."""
        return self.kind == "worst" and self.attacked == 0

    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays that `to_dict` does not contain, by name: margins, points and examples."""
        kept = {} if self.examples is None else vars(self.examples)
        return {"margins": self.margins, "points": self.points} | kept

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with ``robust`` as a string of 0 and 1, and without the other arrays."""
        arrays = ("robust", "examples", "margins", "points")
        values = {name: value for name, value in vars(self).items() if name not in arrays}
        values |= {"n": self.n, "accuracy": self.accuracy, "standard_error": self.standard_error}
        return values | {"robust": "".join("1" if right else "0" for right in self.robust)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> Row:
        """Make a row from the result of `to_dict`, and from those `arrays` that are not None."""
        derived, held = ("n", "accuracy", "standard_error"), dict(arrays or {})
        known = {name: value for name, value in values.items() if name not in derived}
        known |= {"robust": np.array([c == "1" for c in values["robust"]], dtype=bool)}
        known |= {name: held.pop(name, None) for name in ("margins", "points")}
        return cls(**known, examples=Examples(**held) if held else None)

    def describe_variant(self) -> str:
        """The word for the variant of the model that was judged, such as "deterministic", "random" or "fixed noise"."""
        as_deployed = {True: "deterministic", False: "random", None: "as it is"}
        return VARIANTS_APART.get(self.variant, as_deployed[self.deterministic])

    def results(self) -> dict[str, Any]:
        """The results of the attack that the report's page shows, without empty results."""
        values = {name: getattr(self, name) for name in RESULTS}
        return {name.replace("_", " "): value for name, value in values.items() if value or name == "attacked"}

    def describe_health(self) -> str:
        """The shares of non-finite gradients, of zero gradients and of unmoved images, as a short text."""
        if self.health is None:
            return "-"
        h = self.health
        text = f"{_share(h['nonfinite'], h['gradients'])} / {_share(h['zero'], h['gradients'])}"
        return f"{text} / {_share(h['unmoved'], h['images'])}" if h["images"] else f"{text} / -"

    def health_in_words(self) -> str:
        """The shares of `describe_health` in words."""
        if self.health is None:
            return "the gradients were not counted"
        h = self.health
        nonfinite, zero = _share(h["nonfinite"], h["gradients"]), _share(h["zero"], h["gradients"])
        moves = f", and {_share(h['unmoved'], h['images'])} of the images did not move" if h["images"] else ""
        return f"{nonfinite} of the gradients are not finite, {zero} are zero{moves}"


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


def followed(rows: Sequence[Row]) -> str:
    """Name the gradients that attacks on a model itself used, in words that a text can put after "the attack"."""
    by_bpda = {row.kind == "bpda" for row in rows}
    if True not in by_bpda:
        return "along the model's own gradients"
    return "along the gradients of BPDA" if len(by_bpda) == 1 else "along the gradients of the model or of BPDA"


def one_draw(rows: Sequence[Row], row: Row) -> float | None:
    """The mean accuracy of a single draw after an attack; see `purify_fast.evaluation.Report.one_draw`.

    Args:
        rows: the rows of a report, in order.
        row: a row of this report.
    """
    if row.n_eval == 1:
        return None
    of = (row.model, row.threat)
    mine = [each for each in rows if each.is_attack and each.deployed and (each.model, each.threat) == of]
    if row.kind != "worst":
        if not row.of_survivors:
            return row.mean
        mine = mine[: next((i for i, each in enumerate(mine) if each is row), -1) + 1]
    equal = [each for each in mine if each.n == row.n]
    if not equal or (equal[0].of_survivors and mine[0].n > row.n):
        # In the second case, an attack on more images left the survivors. Its mean does not tell how often the first
        # images are classified correctly.
        return None
    # `means` are the accuracies of single draws if a fallen image is predicted as after the attack to which it fell. An
    # attack on all images begins a new chain of attacks, with its own mean. An attack on survivors lowers the means of
    # the chains before it: each image that it fooled contributed 1, and then contributes its share of correct draws.
    # These shares are the row's mean minus its accuracy, because all other images contribute 1 or 0 to both.
    means: list[float] = []
    standing = np.ones(row.n, dtype=bool)
    for each in equal:
        if each.of_survivors and means:
            loss = float((standing & ~each.robust).mean()) - (each.mean - each.accuracy)
            means = [mean - loss for mean in means]
        else:
            means.append(each.mean)
        standing &= each.robust
    # Images that fell only to probes contribute 0.
    return min(means) - (float((standing & ~row.robust).mean()) if row.fell_to_probes else 0.0)


def worst_rows(rows: Sequence[Row]) -> list[Row]:
    """Make the rows over several attacks; in such a row an image is robust if it is robust in all rows of the attacks.

    All attacks of the threat model count, also transferred images and attacks on survivors. A row that was judged on a
    variant of a random model (fixed noise, noise off) counts only for the row over this variant. Its images were also
    tried on the deployed model, in a separate row, which counts for ``worst``. An attack on only the first 200 images
    counts for the row ``worst, first 200``, together with the results of all other attacks on these images. It does not
    count for the row over all images.

    Args:
        rows: rows of one model, with the clean rows.

    Returns:
        For the report's threat model: a row over all images (``worst``), a row for every smaller number of images that
        an attack got, and a row for each variant with several attacks (``worst, deterministic``). For another threat
        model with several attacks: a row over all images, and a row for every smaller number of images.
    """
    full = max(row.n for row in rows)
    attacks = [row for row in rows if row.is_attack]
    apart = [row for row in attacks if row.threat is None and not row.deployed and row.n == full]
    groups: list[tuple[str, list[Row], int]] = []
    for variant in dict.fromkeys(row.variant for row in apart):
        of_variant = [row for row in apart if row.variant == variant]
        groups += [(f"worst, {variant}", of_variant, full)] if len(of_variant) > 1 else []
    for threat in dict.fromkeys([None, *(row.threat for row in attacks)]):
        deployed = [row for row in attacks if row.threat == threat and row.deployed]
        if threat is None or len(deployed) > 1:
            name = "worst" if threat is None else f"worst, {threat}"
            for n in sorted({row.n for row in deployed}, reverse=True):
                label = name if n == full else f"{name}, first {n}"
                groups.append((label, [row for row in deployed if row.n >= n], n))
    return [_row(*group) for group in groups]


def count_fallen(rows: Sequence[Row], fallen: Sequence[int], eps: float) -> None:
    """Mark the images that fell to probes as not robust in the ``worst`` rows.

    Args:
        rows: rows of one model.
        fallen: indices of the images that fell within the report's ball.
        eps: radius of this ball. The images count as fallen within every larger ball too.
    """
    for row in rows:
        larger = row.settings.get("eps", 0) > eps
        if row.kind == "worst" and row.deployed and (row.threat is None or larger):
            row.robust = row.robust.copy()
            row.robust[[image for image in fallen if image < row.n]] = False
            row.mean = row.worst = row.accuracy
            row.reliable = row.reliable or not row.robust.any()
            row.fell_to_probes = sum(image < row.n for image in fallen)


def _row(label: str, group: Sequence[Row], n: int) -> Row:
    robust = np.logical_and.reduce([row.robust[:n] for row in group])
    accuracy = float(robust.mean())
    first = group[0]
    attacked = [row for row in group if row.attacked]
    # The row is reliable if the model's own gradients were usable in at least one attack, because further attacks can
    # only lower the accuracy. Transferred images say nothing about these gradients.
    had_gradients = any(row.reliable and row.health is not None for row in attacked if row.own_gradients)
    return Row(
        model=first.model,
        attack=label,
        kind="worst",
        variant=first.variant,
        robust=robust,
        mean=accuracy,
        worst=accuracy,
        n_eval=first.n_eval,
        seed=first.seed,
        seconds=sum(row.seconds for row in group),
        data=first.data,
        # Missing gradients are no reason for doubt if no image was attacked, or if every image fell.
        reliable=not attacked or had_gradients or not robust.any(),
        settings={"over": [row.attack for row in group]},
        deterministic=first.deterministic,
        attacked=max(row.attacked or 0 for row in group),
        threat=first.threat,
    )


def _share(part: int, whole: int) -> str:
    share = 100 * part / max(1, whole)
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %"
