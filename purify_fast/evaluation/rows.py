"""Rows: the outcome of an attack, image by image, and the worst outcome over several attacks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..attacks import GradientHealth

#: The kinds of attacks that need no gradient.
GRADIENT_FREE = ("square", "hop_skip_jump", "branch_and_bound")
#: The report's words for the modes in which a random model is not deployed.
VARIANTS_APART = {"fixed": "fixed noise", "deterministic": "noise off"}
#: The name of the curve, among a report's curves, that shows the accuracy over the radius after all attacks.
CURVE = "eps, every attack"
#: The fields of a row that describe the outcome of its attack.
RESULTS = ("attacked", "fell_to", "unsearched", "may_hold", "proved", "warnings", "doubts", "fell_to_probes")
#: The kind of a row that repeats an evaluation of others.
AUTHORS = "authors"


@dataclass
class Examples:
    """A few attacked images.

    Args:
        clean: the images before the attack, ``[M, C, H, W]`` float32 in [0, 1].
        adversarial: the same images after it, of the same shape.
        labels: the true classes, int64 ``[M]``.
        fell: images that fell to the attack, bool ``[M]``.
        predicted: the classes predicted after the attack, int64 ``[M]``: for a fallen image a wrong class; -1 if the
            prediction names no class.
        index: their places in the data, int64 ``[M]``, if every fallen image is kept; None if only some are.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    fell: np.ndarray
    predicted: np.ndarray
    index: np.ndarray | None = None

    def first(self, count: int) -> Examples:
        """The first few images, as kept for the pictures."""
        arrays = {name: array[:count] for name, array in vars(self).items() if array is not None}
        return Examples(**arrays | {"index": None})

    def with_following(self, following: Examples) -> Examples:
        """All fallen images, of this part of the data and of the part that follows."""
        both = [part for part in (self, following) if part.fell.any()] or [self]
        return Examples(**{name: np.concatenate([vars(part)[name] for part in both]) for name in vars(self)})


@dataclass(repr=False)
class Row:
    """One model under one attack.

    Args:
        model: the model's name.
        attack: the attack's name; with the model's name it identifies the row.
        kind: ``clean``, an attack's kind, ``worst``, or ``authors``: an evaluation by others, on their model.
        variant: the mode of the model that was judged: ``random``, the model as deployed, whether it draws random
            numbers or not; for a random model also ``fixed`` (noise) or ``deterministic``. `describe_variant` gives the
            words.
        robust: bool ``[n]``, image by image. In a clean row: the first prediction was right. In an attack's row: the
            image was classified correctly, and all ``n_eval`` predictions on the adversarial image were right.
        mean: mean accuracy of a single prediction, over ``n_eval`` predictions. For an image that was not attacked,
            because it was misclassified or had fallen before, they count as wrong. A row of kind ``worst`` has no own
            predictions: there ``mean`` and ``worst`` equal its accuracy, and tables leave them out.
        worst: share of the images for which all ``n_eval`` predictions are right.
        n_eval: number of predictions that judged each image.
        seed: seed of everything random.
        seconds: wall clock time.
        data: a hash of the images and labels.
        health: counts of the gradients (``gradients nonfinite zero images unmoved``), or None if none were counted.
        reliable: whether the attack had gradients to work with, or left nothing anyway; if not, the true number may be
            lower. For a ``worst`` row also: no sign makes it doubtful.
        settings: the options of the attack and of its use, in plain values; for a row over several attacks the names of
            these attacks.
        deterministic: whether two predictions of the model agree; None if unknown.
        attacked: number of images that the attack was given; None in a clean row.
        fell_to: number of images that fell to each target and restart, by its name, if there are several.
        may_end_early: whether a search may have ended before its last step.
        unsearched: number of images that the attack was given and did not search, since it stopped.
        may_hold: the most of these that would fall, at 95 % confidence.
        proved: number of images proved robust by a complete search.
        warnings: texts that a reader must know.
        doubts: the signs that make a ``worst`` row doubtful, by name.
        fell_to_probes: number of images of a ``worst`` row that fell to a probe; None without probes.
        threat: the threat model, such as ``L2 0.5``, if it is not the report's. Such a row counts for no headline, and
            only for the ``worst`` of this threat model.
        transferred: whether the images were found on another model than the judge, or by another model's gradients.
            Another aggregation of the same samples does not make another model.
        nonfinite_predictions: number of predictions that name no class, because of a NaN or of an infinity that several
            classes share; they count as wrong.
        examples: some attacked images, for the pictures.
        margins: lead of the true logit over the next on the attacked images, float32 ``[n]``, the mean over the draws;
            negative for misclassified images. None in a clean or ``worst`` row.
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
        """Share of robust images."""
        return float(self.robust.mean())

    @property
    def always_right(self) -> float:
        """Share of the images that are right in all predictions, the criterion of every attack.

        In a clean row ``robust`` and ``accuracy`` use the first prediction, which decides what is attacked.
        """
        return self.worst if self.kind == "clean" else self.accuracy

    @property
    def standard_error(self) -> float:
        """Binomial: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def deployed(self) -> bool:
        """Tell whether the model was judged as it is deployed, not in another mode."""
        return self.variant not in VARIANTS_APART

    @property
    def own_gradients(self) -> bool:
        """Tell whether the attack followed the gradients of the model that judged it, by any aggregation."""
        return not self.transferred and self.kind not in GRADIENT_FREE

    @property
    def lacked_gradients(self) -> bool:
        """Tell whether the gradients of the attack were counted and were not usable."""
        return self.health is not None and not GradientHealth(dict(self.health)).reliable

    @property
    def is_attack(self) -> bool:
        """Tell whether this is an attack on the model itself: not ``clean``, ``worst`` or an evaluation by others."""
        return self.kind not in ("clean", "worst", AUTHORS)

    @property
    def of_survivors(self) -> bool:
        """Tell whether the attack was given only images that earlier attacks had left right."""
        return bool(self.settings.get("survivors_only"))

    @property
    def nothing_to_attack(self) -> bool:
        """Tell whether this is a ``worst`` over attacks without any correctly classified image to attack."""
        return self.kind == "worst" and self.attacked == 0

    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays that `to_dict` leaves out, by name: the margins, the points and the examples."""
        kept = {} if self.examples is None else vars(self.examples)
        return {"margins": self.margins, "points": self.points} | kept

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``robust`` as a string of 0 and 1; without the other arrays."""
        arrays = ("robust", "examples", "margins", "points")
        values = {name: value for name, value in vars(self).items() if name not in arrays}
        values |= {"n": self.n, "accuracy": self.accuracy, "standard_error": self.standard_error}
        return values | {"robust": "".join("1" if right else "0" for right in self.robust)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> Row:
        """The inverse of `to_dict`, and of `arrays` without empty arrays."""
        derived, held = ("n", "accuracy", "standard_error"), dict(arrays or {})
        known = {name: value for name, value in values.items() if name not in derived}
        known |= {"robust": np.array([c == "1" for c in values["robust"]], dtype=bool)}
        known |= {name: held.pop(name, None) for name in ("margins", "points")}
        return cls(**known, examples=Examples(**held) if held else None)

    def describe_variant(self) -> str:
        """A word for the judged model: deterministic, random, or a mode of a random model."""
        if not self.deployed:
            return VARIANTS_APART[self.variant]
        words = {True: "deterministic", False: "random", None: "as it is"}
        return words[self.deterministic]

    def results(self) -> dict[str, Any]:
        """The results of the attack for the reader, without empty results."""
        values = {name: getattr(self, name) for name in RESULTS}
        return {name.replace("_", " "): value for name, value in values.items() if value or name == "attacked"}

    def describe_health(self) -> str:
        """The shares of non-finite and zero gradients and of unmoved images, as one short text."""
        if self.health is None:
            return "-"
        h = self.health
        text = f"{_share(h['nonfinite'], h['gradients'])} / {_share(h['zero'], h['gradients'])}"
        return f"{text} / {_share(h['unmoved'], h['images'])}" if h["images"] else f"{text} / -"


@dataclass(frozen=True)
class Paired:
    """A difference of accuracies on the same images.

    Args:
        difference: difference of the two accuracies, between -1 and 1.
        standard_error: standard error of the paired differences.
        n: number of images.
    """

    difference: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.standard_error:.1f} points (n = {self.n}, paired)"


def followed(rows: Sequence[Row]) -> str:
    """The words for the gradients that attacks on a model itself followed, as in "the attack along ..."."""
    by_bpda = {row.kind == "bpda" for row in rows}
    if True not in by_bpda:
        return "along the model's own gradients"
    return "along the gradients of BPDA" if len(by_bpda) == 1 else "along the gradients of the model or of BPDA"


def one_draw(rows: Sequence[Row], row: Row) -> float | None:
    """The mean accuracy of one draw after an attack; see `purify_fast.evaluation.Report.one_draw`.

    Args:
        rows: of a report, in order.
        row: one of them.
    """
    if row.n_eval == 1:
        return None
    of = (row.model, row.threat, row.n)
    mine = [each for each in rows if each.is_attack and each.deployed and (each.model, each.threat, each.n) == of]
    worst = row.kind == "worst"
    if not worst:
        if not row.of_survivors:
            return row.mean
        place = next((i for i, each in enumerate(mine) if each is row), None)
        mine = [] if place is None else mine[: place + 1]
    whole = [each.mean for each in mine if not each.of_survivors]
    if whole or not mine:
        return min(whole) if worst and whole else None
    # The mean of a row counts images that withstood as 1, images that fell to this attack by their share of right
    # draws, and all others as 0. So mean minus accuracy is what the images that fell to this attack add to the mean.
    return row.accuracy + sum(each.mean - each.accuracy for each in mine)


def model_names(rows: Sequence[Row]) -> list[str]:
    """The names of the models, in order."""
    return list(dict.fromkeys(row.model for row in rows))


def attack_names(rows: Sequence[Row]) -> list[str]:
    """The names of the attacks, in order: clean, attacks, the worst over them, other threat models."""
    order = {"clean": 0, "worst": 2}
    ordered = sorted(rows, key=lambda row: 3 if row.threat is not None else order.get(row.kind, 1))
    return list(dict.fromkeys(row.attack for row in ordered))


def joined(row: Row, following: Row | None) -> Row:
    """The row of all images, joined from the rows of two consecutive parts.

    Args:
        row: row of an attack, or of the clean images.
        following: the same row for the images that follow; None: the attack covers none of these.
    """
    if following is None:
        return row
    robust = np.concatenate([row.robust, following.robust])
    shares = np.array([row.n, following.n]) / len(robust)
    healths = [dict(part.health) for part in (row, following) if part.health is not None]
    health = {name: sum(part[name] for part in healths) for name in healths[0]} if healths else None
    known = row.reliable and following.reliable if health is None else GradientHealth(dict(health)).reliable
    shown = [part.examples for part in (row, following) if part.examples is not None]
    examples = next((part for part in shown if part.fell.any()), shown[0] if shown else None)
    if len(shown) == 2 and shown[0].index is not None:
        examples = shown[0].with_following(shown[1])
    both = row.margins is not None and following.margins is not None
    counts = ("seconds", "unsearched", "may_hold", "proved", "nonfinite_predictions")
    return replace(
        row,
        **{name: getattr(row, name) + getattr(following, name) for name in counts},
        robust=robust,
        mean=float(shares @ [row.mean, following.mean]),
        worst=float(shares @ [row.worst, following.worst]),
        health=health,
        reliable=known or not robust.any(),
        attacked=None if row.attacked is None else row.attacked + (following.attacked or 0),
        fell_to=dict(Counter(row.fell_to) + Counter(following.fell_to)),
        warnings=list(dict.fromkeys([*row.warnings, *following.warnings])),
        examples=examples,
        margins=np.concatenate([row.margins, following.margins]) if both else None,
    )


def worst_rows(rows: Sequence[Row]) -> list[Row]:
    """For each image, the worst over all rows of a threat model on the same images, judged by the deployed model.

    AutoAttack, transferred images and rows of survivors count like other rows: an image that any row broke is broken. A
    row judged by a variant of a random model (fixed noise, noise off) counts for that variant alone. Its images were
    tried on the deployed model too, in a row that counts here. Attacks on the first 200 images enter a row named after
    these (``worst, first 200``), together with the other attacks' results on the same images. They do not change the
    row over all images.

    Args:
        rows: rows of one model, clean rows included.

    Returns:
        For the report's threat model a row over all images (``worst``), a row for every smaller number of images, and a
        row for each variant with several attacks (``worst, deterministic``). For another threat model with several
        attacks the first two.
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
    """Count images that fell to something other than the attacks as fallen, in the rows over all attacks.

    Args:
        rows: rows of one model.
        fallen: numbers of the images that fell within the report's ball.
        eps: radius of that ball; the images have fallen within every larger ball too.
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
    # The row is reliable if one attack along the model's own gradients found them usable: further attacks can only
    # lower the number. Transferred images do not count, since they say nothing about these gradients.
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
        # Missing gradients do not matter if no image was attacked, or if no image is left.
        reliable=not attacked or had_gradients or not robust.any(),
        settings={"over": [row.attack for row in group]},
        deterministic=first.deterministic,
        attacked=max(row.attacked or 0 for row in group),
        threat=first.threat,
    )


def _share(part: int, whole: int) -> str:
    share = 100 * part / max(1, whole)
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %"
