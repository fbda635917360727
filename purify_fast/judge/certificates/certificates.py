"""`Certificates`: what is proved for each image, what attacks have refuted, and the report on both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from ..._files import write_text
from ..._validation import Count, Positive, Range, check_folder, check_types
from ..show.text import render
from .log import COLUMNS, write_log
from .sequences import LARGEST, MOST, Floats, answers, distances, looks, lower_bounds, most_wrong

FORMAT = 3
#: The columns of the table.
HEAD = ("L2 radius", "robust accuracy", "all together", "certified", "no certificate", "undecided", "refuted")
NORMAL = NormalDist()
Radius = Annotated[float, Range(0, below=True)]


def _read(kind: type, values: Any) -> NDArray[Any]:
    """An array of lists in a file, whose values must all be of a type."""
    array = np.array(values, dtype=object)
    if any(type(one) is not kind for one in array.flat):
        raise TypeError(f"not {kind.__name__}")
    return array.astype(kind)


def _fits(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray((pairs[..., 0] >= 0) & (pairs[..., 0] <= pairs[..., 1]))


#: The arrays of whole numbers. `decided` is ``[N, questions, 2]``, and the others are ``[N]``.
ARRAYS = ("right", "draws", "index", "labels", "tested", "decided")
#: The fields of a file: what each must be, and how it is read. The object's own checks follow.
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(ARRAYS, ("whole numbers in lists of equal lengths", lambda lists: _read(int, lists))),
    **dict.fromkeys(("sigma", "alpha", "looks"), ("a number", lambda value: value)),
    "radii": ("a list of numbers", tuple),
    "refuted": ("lists of true and false by radius", lambda by: {float(at): _read(bool, by[at]) for at in by}),
    "about": ("texts by name", lambda texts: dict(zip(texts, _read(str, [*texts.values()]).tolist(), strict=True))),
    "notes": ("a list of texts", lambda texts: _read(str, texts).tolist()),
}


def _stairs(share: float, steps: Iterable[tuple[float, float]], most: float) -> list[tuple[float, float]]:
    """The corners of a curve with steps, as pairs of a radius and a share."""
    corners = [(0.0, share)]
    for at, next_share in steps:
        corners += [(at, corners[-1][1]), (at, next_share)]
    return [*corners, (most, corners[-1][1])]


@dataclass(frozen=True, eq=False)
class Certificates:
    """The certificates of images for a smoothed classifier, from `purify_fast.evaluation.certify`.

    Attributes:
        right: for each image, the number of draws with the tested class, int64 ``[N]``.
        draws: for each image, the number of draws, int64 ``[N]``.
        sigma: standard deviation of the noise, in image units.
        radii: the L2 radii in image units about which was asked; empty if each image has its largest radius.
        alpha: the largest probability of a wrong certificate, for each image and all its radii together.
        refuted: by radius, the images for which an attack has found an image within this L2 distance where another
            class is more frequent than the label, bool ``[N]``. It is proved with the same probability.
        about: facts, such as ``name``, ``precision``, ``predicted_by``, ``version``, ``seed`` and ``seconds``.
        notes: remarks, each a sentence.
        index: the images' indices in their data set, int64 ``[N]``. None: 0 to N - 1.
        labels: the labels, int64 ``[N]``; -1 for an unknown label. None: all are unknown.
        tested: the class of which the draws are counted, int64 ``[N]``. None: the labels.
        looks: the number of looks that share alpha at the largest radius.
        decided: the draws with the tested class and the draws at the look that counts, int64 ``[N, questions, 2]``: for
            each of `radii`, the look that answered, or the last; for the largest radius, the look that proves most.
            None: all draws were counted in a single look.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    right: NDArray[np.int64]
    draws: NDArray[np.int64]
    sigma: Positive
    radii: tuple[Radius, ...]
    alpha: Annotated[float, Range(0, 0.5, above=True)]
    refuted: dict[float, NDArray[np.bool_]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    index: NDArray[np.int64] = None  # type: ignore[assignment]
    labels: NDArray[np.int64] = None  # type: ignore[assignment]
    tested: NDArray[np.int64] = None  # type: ignore[assignment]
    looks: Count = 1
    decided: NDArray[np.int64] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_types(self)
        for radius in self.refuted:
            Range(0, below=True).check("each radius of refuted", radius)
        n, questions = len(self.right), max(1, len(self.radii))
        arrays = dict[str, Any]({f"refuted[{at}]": each for at, each in self.refuted.items()})
        later: dict[str, Any] = {"labels": lambda: np.full(n, -1), "tested": lambda: self.labels}
        later |= {"index": lambda: np.arange(n), "decided": lambda: self._drawn().repeat(questions, 1)}
        for name in (*arrays, *ARRAYS):
            if getattr(self, name, name) is None:
                object.__setattr__(self, name, later[name]())
            array: Any = arrays.setdefault(name, getattr(self, name, None))
            shape = (n, questions, 2) if name == "decided" else (n,)
            kind = np.int64 if name in ARRAYS else np.bool_
            if array.dtype != kind or array.shape != shape or not array.size:
                raise ValueError(f"{name} must be {kind.__name__} {[*shape]}, got {array.dtype} {[*array.shape]}")
        look, rest, first = self.decided, self._drawn() - self.decided, np.unique(self.index, return_index=True)[1]
        # The draws of a test are looked at after known numbers of draws.
        timely = np.isin(look[..., 1], [0, *looks(MOST)]) | (not self.radii)
        for name, allowed, good in (
            ("right", f"from 0 to the draws, at most {MOST}", _fits(self._drawn()[:, 0]) & (self.draws <= MOST)),
            ("index", f"in [0, {LARGEST})", (self.index >= 0) & (self.index < LARGEST)),
            ("index", "another number for each image", np.isin(np.arange(n), first)),
            ("labels", "class numbers, or -1", self.labels >= -1),
            ("tested", "class numbers, or -1", self.tested >= -1),
            # The draws of a look are some of the image's draws, right ones and wrong ones.
            ("decided", "right draws and draws of a look, some of the image's", _fits(look) & _fits(rest)),
            ("decided", f"after a number of draws of a look, such as {looks(MOST)[:3]}", timely),
        ):
            if not good.all():
                raise ValueError(f"{name} must be {allowed}, got {arrays[name][~good][0].tolist()}")

    def _drawn(self) -> NDArray[np.int64]:
        """All right draws and all draws, int64 ``[N, 1, 2]``."""
        return np.stack([self.right, self.draws], -1)[:, None]

    def threshold(self, radius: float) -> float:
        """The probability of the class that a certificate at a radius needs: Phi(radius / sigma)."""
        return NORMAL.cdf(radius / self.sigma)

    def _answers(self) -> NDArray[np.int8]:
        """The answers at `radii` for the tested class, int8 ``[N, radii]``."""
        return answers(self.decided, [*map(self.threshold, self.radii)], self.alpha)

    def _reached(self) -> Floats:
        """The largest radius that is proved for the tested class, float64 ``[N]``; below 0 if there is none."""
        if self.radii:
            return np.asarray(np.where(self._answers() == 1, self.radii, -1.0).max(1))
        return self.sigma * distances(lower_bounds(self.decided[:, 0], self.alpha / self.looks))

    @property
    def probability(self) -> Floats:
        """The proved probability (p_A) of the label or of the tested class, float64 ``[N]``; 0 for a wrong class."""
        proved = np.array([*map(self.threshold, self._reached().tolist())])
        return np.where((self.labels == self.tested) | (self.labels < 0), proved, 0.0)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class that the smoothed classifier is proved to predict, int64 ``[N]``; -1 where it abstains."""
        return np.where(self._reached() >= 0, self.tested, -1)

    @property
    def radius(self) -> Floats:
        """For each image, the largest L2 radius that is proved, in image units, float64 ``[N]``.

        It is 0 where the classifier abstains or predicts another class than the label; `predicted` tells both apart.
        With `radii`, it is the largest of those that are certified, and its mean is not the average certified radius.
        """
        known = (self.labels == self.tested) | (self.labels < 0)
        return np.where(known, np.maximum(self._reached(), 0.0), 0.0)

    def decisions(self, radius: float) -> NDArray[np.int8]:
        """Decide each image at a radius, int8 ``[N]``: 1 if it is certified, -1 if it cannot be, 0 if this is open.

        An image cannot be certified if another class than its label is certified, or if the model's probability of the
        tested class is not above the threshold. The smoothed classifier may still be robust there.
        """
        reached, other = self._reached(), (self.labels != self.tested) & (self.labels >= 0)
        found = np.where(reached >= radius, np.where(other, -1, 1), np.where(other & (reached >= 0), -1, 0))
        for asked, answer in zip(self.radii, self._answers().T if self.radii else (), strict=True):
            # The absence of a certificate holds also within a larger ball.
            found = np.where((answer == -1) & (asked <= radius) & (found == 0), -1, found)
        return found.astype(np.int8)

    def certified(self, radius: float) -> NDArray[np.bool_]:
        """The images that are certified at a radius, bool ``[N]``."""
        return np.asarray(self.decisions(radius) == 1)

    @property
    def log(self) -> dict[str, NDArray[Any]]:
        """The columns of `log.COLUMNS`, each ``[N]``. An image's time is its share of all draws."""
        draws = self.draws + int(self.about.get("choosing_draws", 0))
        seconds = float(self.about.get("seconds", 0)) * draws / max(1, draws.sum())
        correct = (self.predicted == self.labels) & (self.labels >= 0)
        public = (
            self.index,
            self.labels,
            self.predicted,
            np.maximum(self._reached(), 0.0),
            correct.astype(int),
            seconds,
        )
        return dict(zip(COLUMNS, (*public, self.tested, self.right, self.draws), strict=True))

    @property
    def acr(self) -> float:
        """The average certified radius: the mean of `radius`. It needs the largest radii, and all labels."""
        if self.radii or (self.labels < 0).any():
            raise ValueError(f"acr needs labels, and the largest radii: certify without radius, got radii {self.radii}")
        return float(self.radius.mean())

    def accuracy_at(self, radii: Sequence[float]) -> Floats:
        """The certified accuracy at radii: the shares of images with the right class and at least this radius."""
        return np.array([self.certified(radius).mean() for radius in radii])

    @property
    def shown(self) -> tuple[float, ...]:
        """The radii of the table: `radii`, or multiples of sigma up to the largest radius of an image."""
        steps = int(max(1, self.radius.max() / self.sigma))
        return self.radii or tuple(step * self.sigma for step in range(steps + 1))

    def _numbers(self, radius: float) -> tuple[int, int, int]:
        """The numbers of images that are certified, that are so for all images together, and that are not refuted."""
        standing = np.ones(len(self.draws), dtype=bool)
        for tried, refuted in self.refuted.items():
            standing &= ~(refuted & (tried <= radius))
        good = int(self.certified(radius).sum())
        return good, max(0, good - most_wrong(len(self.draws), self.alpha)), int(standing.sum())

    def between(self, radius: float) -> tuple[float, float]:
        """The robust accuracy of the smoothed classifier at a radius, from below and from above, in [0, 1].

        Below: the share of certified images. Above: the share that no attack within the radius has refuted.
        """
        low, _, high = self._numbers(radius)
        return low / len(self.draws), high / len(self.draws)

    def at_least(self, radius: float) -> float:
        """A lower bound, in [0, 1], for the share of these images that are robust, for all images together.

        Robust: the smoothed classifier predicts the label in the whole ball. Each certificate may be wrong, so a few of
        many are. Except with a probability of at most `alpha`, they are at most as many as `sequences.most_wrong` says,
        at all radii at the same time, and these are subtracted. Nothing is said about images that are not here.
        """
        return self._numbers(radius)[1] / len(self.draws)

    def contradictions(self, radius: float) -> NDArray[np.int64]:
        """The places of images that are certified and refuted at a radius up to this one: one of both is wrong."""
        both = [self.certified(tried) & refuted for tried, refuted in self.refuted.items() if tried <= radius]
        return np.flatnonzero(np.logical_or.reduce(both)) if both else np.array([], dtype=np.int64)

    def sentence(self, radius: float, together: bool = False) -> str:
        """The robust accuracy at a radius in words, such as ``between 41.0 and 47.0 %``, rounded outwards.

        ``together``: the bound of `at_least`.
        """
        n, (low, sure, high) = len(self.draws), self._numbers(radius)
        # Whole numbers are divided exactly. The last zero of two decimals is left out.
        parts = (10_000 * (sure if together else low) // n, -(-10_000 * high // n))
        least, most = (f"{part // 100}.{part % 100:02}".removesuffix("0") for part in parts)
        attacked = not together and any(tried <= radius for tried in self.refuted)
        return f"between {least} and {most} %" if attacked else f"at least {least} %"

    def to_json(self) -> str:
        """The certificates as JSON."""
        content = {name: getattr(self, name) for name in FIELDS}
        content |= {name: content[name].tolist() for name in ARRAYS}
        content["refuted"] = {str(radius): each.tolist() for radius, each in self.refuted.items()}
        accuracy = {str(each): [self.sentence(each), self.sentence(each, together=True)] for each in self.shown}
        return json.dumps({"format": FORMAT, **content, "accuracy": accuracy}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificates:
        """Read certificates from the result of `to_json`. All decisions are computed again from the counts.

        Raises:
            ValueError: another format, or a field is missing, unknown, or has a value that is not allowed.
        """
        content: Any = json.loads(text)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"the certificates must have format {FORMAT}: certify again")
        if other := sorted(content.keys() ^ {*FIELDS, "accuracy"}):
            raise ValueError(f"the fields must be {', '.join(FIELDS)} and accuracy, too few or too many are {other}")
        for name, (allowed, read) in FIELDS.items():
            try:
                content[name] = read(content[name])
            except (AttributeError, OverflowError, TypeError, ValueError) as error:
                raise ValueError(f"{name} must be {allowed}, got {content[name]!r:.200}") from error
        return cls(**{name: content[name] for name in FIELDS})

    def lines(self) -> list[tuple[str, ...]]:
        """A line of the report's table for each radius: radius, accuracy, and counts of images."""
        rows = []
        for radius in self.shown:
            counts = [str((self.decisions(radius) == each).sum()) for each in (1, -1, 0)]
            counts.append(str(self.refuted[radius].sum()) if radius in self.refuted else "-")
            rows.append((str(radius), self.sentence(radius), self.sentence(radius, together=True), *counts))
        return rows

    def summary(self, radii: Sequence[float]) -> dict[str, str]:
        """The line of the table of several certificates, by its columns."""
        n, parts = len(self.draws), ["-"] * 4
        if not self.radii and (self.labels >= 0).all():
            parts = [f"{value:.3f}" for value in (self.acr, *np.quantile(self.probability, [0.25, 0.5, 0.75]))]
        return {
            **{"model": self.about.get("name", "a model"), "sigma": str(self.sigma), "images": str(n)},
            **{f"L2 {radius:g}": f"{10_000 * self._numbers(radius)[0] // n / 100:.2f}" for radius in radii},
            **dict(zip(("ACR", "p_A 25 %", "p_A 50 %", "p_A 75 %"), parts, strict=True)),
            **{"draws": f"{self.draws.sum():,}", "seconds": self.about.get("seconds", "-")},
        }

    def to_text(self, beside: Sequence[Certificates] = ()) -> str:
        """The report as text for a terminal; ``beside``: certificates that share its last table."""
        return render("certificates.txt.jinja", **self._shown(beside)).rstrip()

    def to_html(self, beside: Sequence[Certificates] = ()) -> str:
        """The report as a HTML page that loads no other files, with the accuracy over the radius.

        ``beside``: certificates of other models or another sigma, which are drawn on the same page.
        """
        draws = f"{self.draws.sum():,}, in the median {int(np.median(self.draws)):,} for an image"
        facts = {"draws": draws, **{name.replace("_", " "): value for name, value in self.about.items()}}
        return render("certificates.html.jinja", **self._shown(beside), facts=facts)

    def _shown(self, beside: Sequence[Certificates]) -> dict[str, Any]:
        """Return the values that the text and the page show."""
        every = [self, *beside]
        radii = sorted({radius for made in every for radius in made.shown})
        most, table = 1.05 * (max(radii) or self.sigma), [made.summary(radii) for made in every]
        above = _stairs(1.0, ((at, self.between(at)[1]) for at in sorted(self.refuted)), most)
        drawing = {"most": most, "radii": radii, "above": above, "below": [made._below(most) for made in every]}
        median = int(np.median(self.draws))
        return {"report": self, "head": HEAD, "median": median, "table": table, "drawing": drawing}

    def _below(self, most: float) -> list[tuple[float, float]]:
        """The corners of the certified accuracy over the radius."""
        reached = np.where(self.certified(0.0), self.radius, -1.0)
        steps = np.unique(reached[(reached > 0) & (reached < most)]).tolist()
        return _stairs(float((reached >= 0).mean()), ((at, float((reached > at).mean())) for at in steps), most)

    def save(self, folder: str | Path, beside: Sequence[Certificates] = ()) -> None:
        """Write ``certificates.html``, ``.json`` and ``.txt``, and ``log.tsv``, atomically into a folder."""
        folder = Path(folder)
        check_folder("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.about.setdefault("date", datetime.now().astimezone().isoformat(" ", "minutes"))
        write_text(folder / "certificates.json", self.to_json())
        write_text(folder / "certificates.txt", self.to_text(beside) + "\n")
        write_text(folder / "certificates.html", self.to_html(beside))
        write_log(folder / "log.tsv", self.log)
