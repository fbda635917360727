"""What an evaluation found, image by image: one row for each attack, so that models can be compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ..attacks import GradientHealth

#: The targets of rows that follow the gradients of the model itself, by its own aggregation or by an attacker's.
OWN_TARGETS = ("defence", "WithAggregation", "AttackersHead")
#: Attacks that ask for no gradient.
GRADIENT_FREE = ("square",)
#: The modes of a random model that are not the model as it is deployed, in words.
VARIANTS_APART = {"fixed": "fixed noise", "deterministic": "noise off"}
#: The kind of a row that repeats an evaluation of others.
AUTHORS = "authors"


@dataclass
class Examples:
    """A few attacked images.

    Args:
        clean: the images before the attack, ``[M, C, H, W]`` float32 in [0, 1].
        adversarial: the same images after it, of the same shape.
        labels: the true classes, int64 ``[M]``.
        fell: which of them fell to the attack, bool ``[M]``; None in rows that earlier versions kept.
        predicted: the classes predicted after the attack, int64 ``[M]``, of an image that fell by a prediction that was
            wrong; -1 where it names no class. None in rows that earlier versions kept.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    fell: np.ndarray | None = None
    predicted: np.ndarray | None = None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What is known, by name, for a file."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_arrays(cls, found: Mapping[str, np.ndarray]) -> Examples:
        """The inverse of `to_arrays`, also of files of earlier versions, which have less.

        Args:
            found: the arrays by name, and others.
        """
        return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})


@dataclass(repr=False)
class Row:
    """One model under one attack.

    Args:
        model: the model's name.
        attack: the attack's name; with the model's name it identifies the row.
        kind: ``clean``, an attack's kind, ``worst``, or ``authors``: an evaluation of others, on a model of theirs.
        variant: which mode of the model was judged: ``random``, the model as it is deployed, whether it draws random
            numbers or not; of a random model also ``fixed`` (noise) or ``deterministic``. `describe_variant` says it in
            words.
        robust: bool ``[n]``, image by image. Of a clean row: the first prediction was right. Of an attack: the image
            was classified correctly, and all ``n_eval`` predictions on the adversarial image were right.
        mean: mean accuracy of one prediction, over ``n_eval`` of them; of an image that was not attacked, because it
            was misclassified or had fallen before, they count as wrong. A row of kind ``worst`` has no predictions of
            its own: there this and the next are its accuracy, and tables leave them out.
        worst: share of the images for which all ``n_eval`` predictions are right.
        n_eval: how many predictions judged each image.
        seed: of everything random.
        seconds: wall clock time.
        data: a hash of the images and labels.
        health: counts of the gradients (``gradients nonfinite zero images unmoved``), or None where none were counted.
        reliable: whether the attack had gradients to work with, or left nothing anyway; if not, the true number may be
            lower. Of a ``worst`` row also whether no sign makes it doubtful.
        settings: what was run, in plain values, and whether the model is ``deterministic``.
        threat: the threat model, such as ``L2 0.5``, where it is another than the report's. Such a row is in no
            headline and in no ``worst`` but its own.
        nonfinite_predictions: how many of the predictions name no class, because of a NaN or of an infinity that
            several classes share; they count as wrong.
        examples: some attacked images, for the pictures.
        margins: by how much the true logit leads the next on the attacked images, float32 ``[n]``, the mean over the
            draws; negative where they are misclassified. Of a clean or ``worst`` row None.
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
    threat: str | None = None
    nonfinite_predictions: int = 0
    examples: Examples | None = field(default=None, compare=False)
    margins: np.ndarray | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        percent = f"{100 * self.accuracy:.1f} ± {100 * self.standard_error:.1f} %" if self.n else "no images"
        return f"Row({self.model!r}, {self.attack!r}, {percent}, n = {self.n})"

    @property
    def n(self) -> int:
        """How many images the row is about."""
        return len(self.robust)

    @property
    def accuracy(self) -> float:
        """Share of robust images."""
        return float(self.robust.mean())

    @property
    def standard_error(self) -> float:
        """Binomial: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def deployed(self) -> bool:
        """Whether the model was judged as it is deployed, and not in a mode of its own."""
        return self.variant not in VARIANTS_APART

    @property
    def follows_own_gradients(self) -> bool:
        """Whether the attack followed the gradients of the model that judged it, by any aggregation."""
        return self.kind not in GRADIENT_FREE and self.settings.get("target", "defence") in OWN_TARGETS

    @property
    def lacked_gradients(self) -> bool:
        """Whether the gradients of the attack were counted and were not usable."""
        return self.health is not None and not GradientHealth(dict(self.health)).reliable

    @property
    def is_attack(self) -> bool:
        """Whether this is an attack on the model itself: no ``clean``, no ``worst``, no evaluation of others."""
        return self.kind not in ("clean", "worst", AUTHORS)

    @property
    def nothing_to_attack(self) -> bool:
        """Whether this is a ``worst`` over attacks none of which had a correctly classified image to attack."""
        return self.kind == "worst" and self.settings.get("attacked") == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``robust`` as a string of 0 and 1; without the examples."""
        values = {name: value for name, value in self.__dict__.items() if name not in ("robust", "examples", "margins")}
        values |= {"n": self.n, "accuracy": self.accuracy, "standard_error": self.standard_error}
        return values | {"robust": "".join("1" if right else "0" for right in self.robust)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        derived = ("n", "accuracy", "standard_error")
        values = {name: value for name, value in values.items() if name not in derived}
        return cls(**values | {"robust": np.array([c == "1" for c in values["robust"]], dtype=bool)})

    def describe_variant(self) -> str:
        """What was judged, in a word: the model as it is, and whether that is random, or a mode of a random one."""
        if not self.deployed:
            return VARIANTS_APART[self.variant]
        # reports of earlier versions say nothing of the model, but only a random one is asked several times
        known = self.settings.get("deterministic", False if self.n_eval > 1 else None)
        return "as it is" if known is None else "deterministic" if known else "random"

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
        difference: of the two accuracies, between -1 and 1.
        standard_error: of the paired differences.
        n: how many images.
    """

    difference: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.standard_error:.1f} points (n = {self.n}, paired)"


def model_names(rows: Sequence[Row]) -> list[str]:
    """The names of the models, in order."""
    return list(dict.fromkeys(row.model for row in rows))


def attack_names(rows: Sequence[Row]) -> list[str]:
    """The names of the attacks: clean, then attacks, then the worst over them, then other threat models; in order."""
    order = {"clean": 0, "worst": 2}
    ordered = sorted(rows, key=lambda row: 3 if row.threat is not None else order.get(row.kind, 1))
    return list(dict.fromkeys(row.attack for row in ordered))


def _share(part: int, whole: int) -> str:
    share = 100 * part / max(1, whole)
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %"
