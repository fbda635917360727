"""`Certificates`: what is proved for each image, what attacks have refuted, and the report on both."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..._files import check_folder, write_text
from ..._validation import Range, check_types
from ..estimates import Floats, Numbers, binomial, lower_bounds
from ..show.text import latex_table, render

#: The numbers of draws of the looks are these times powers of ten: twenty in a decade.
DECADE = (100, 112, 125, 140, 160, 180, 200, 225, 250, 280, 320, 360, 400, 450, 500, 560, 640, 720, 800, 900)
#: The first look.
FIRST = 20
#: The largest number of draws of an image, and the limit of the indices of images. The names of a random model's draws
#: are whole numbers of 32 bits.
MOST, LARGEST = 2**27, 2**31
#: A look spends alpha up to 1 - REST (c / n)^POWER of it. c draws, all right, have the probability alpha.
REST, POWER = 0.7, 0.2
#: The share of alpha that is kept back for rounding, and the largest relative probability of what is left out.
ROUNDING, NOTHING = 1e-6, 1e-20


def looks(most: int) -> list[int]:
    """The numbers of draws after which a test looks, up to ``most``."""
    numbers = (digits * 10**zeros // 100 for zeros in range(1, 10) for digits in DECADE)
    return [number for number in numbers if FIRST <= number <= most]


def spent(draws: int, threshold: float, alpha: float) -> float:
    """The probability that the looks up to a number of draws may spend on wrong answers."""
    share = math.log(alpha) / math.log(threshold) / draws
    return alpha * (1 - ROUNDING) * max(0.0, 1 - REST * share**POWER)


@functools.lru_cache(maxsize=256)
def boundary(threshold: float, alpha: float, most: int) -> tuple[int, ...]:
    """The least number of right draws, for each of `looks`, that proves a probability above a threshold in (0, 1).

    It is larger than the number of draws at a look that proves nothing.
    """
    start, mass, left, least = 0, np.ones(1), 0.0, list[int]()
    for first, last in pairwise((0, *looks(most))):
        steps = binomial(last - first, threshold)
        kept = np.flatnonzero(steps > alpha * NOTHING)
        # The probabilities of start, start + 1, ... right draws without an answer so far.
        mass, start = np.convolve(mass, steps[kept[0] : kept[-1] + 1]), start + int(kept[0])
        beyond = np.append(mass[::-1].cumsum()[::-1], 0.0)
        enough = int(np.argmax(left + beyond <= spent(last, threshold, alpha)))
        least.append(start + enough)
        left += float(beyond[enough])
        kept = np.flatnonzero(mass[:enough] > alpha * NOTHING)
        mass, start = mass[kept[0] : enough], start + int(kept[0])
    return tuple(least)


def answers(counts: Numbers, thresholds: Sequence[float], alpha: float) -> NDArray[np.int8]:
    """Compare the true probabilities of images with thresholds, int8 ``[N, thresholds]``.

    1 is above a threshold, -1 is not above it, and 0 is not known at this look. The first answers of an image are all
    right together, except with the probability ``alpha`` for the 1 and as much for the -1: an image is above a
    threshold only at a look at which it is above all smaller ones, and so on.

    Args:
        counts: right draws and draws at the look for each threshold, ``[N, thresholds, 2]``. The draws are numbers of
            `looks`. With 0 draws there is no answer.
        thresholds: probabilities in (0, 1).
        alpha: the largest probability of a wrong answer of a kind, in (0, 1).
    """
    right, draws = counts[..., 0], counts[..., 1]
    most, order = max(FIRST, int(draws.max(initial=0))), np.argsort(thresholds, kind="stable")
    at, ordered = np.array(looks(most)), [float(thresholds[place]) for place in order]
    above = np.maximum.accumulate([boundary(p, alpha, most) for p in ordered])
    below = at - np.maximum.accumulate([boundary(1 - p, alpha, most) for p in ordered[::-1]])[::-1]
    rank, place = order.argsort(), np.searchsorted(at, draws)
    answer = (right >= above[rank, place]).astype(np.int8) - (right <= below[rank, place]).astype(np.int8)
    return np.where(draws > 0, answer, 0).astype(np.int8)


def most_wrong(images: int, alpha: float) -> int:
    """The most certificates that are wrong, except with the probability alpha, if each is wrong with at most alpha.

    The draws of images are independent, so the number of wrong certificates is at most binomial.
    """
    # The probability of more than k wrong certificates. The sum begins with the smallest terms, and is exact to 1e-12.
    return int((binomial(images, alpha)[::-1].cumsum()[::-1][1:] > alpha * (1 + 1e-9)).sum())


def leads(right: Numbers, rivals: Numbers, classes: int, alpha: float) -> NDArray[np.int8]:
    """Compare the label with all other classes: -1 if another class is more frequent, 1 if the label is, 0 if open.

    Among the draws with the label or with one other class, the share of the other class is compared with 1/2. The
    evidence against 1/2 is the mean of likelihood ratios over a Beta(1/2, 1/2) distribution of the alternative
    (Robbins, Annals of Mathematical Statistics 41, 1970). If 1/2 is true, it is a martingale that begins with 1, so it
    ever reaches 1 / alpha with a probability of at most alpha (Ville, 1939), at whatever draws it is looked at. -1 is
    wrong with a probability of at most ``alpha``: each of the other classes gets an equal part of it.

    Args:
        right: draws with the label, ``[N]``.
        rivals: draws with the most frequent other class, ``[N]``. Its evidence is the largest of all other classes.
        classes: number of the other classes.
        alpha: the largest probability of a wrong -1, in (0, 1).
    """
    counts = torch.from_numpy(np.stack([right, rivals]).astype(np.float64))
    both = counts.sum(0)
    mixed = torch.lgamma(counts + 0.5).sum(0) - torch.lgamma(both + 1) - math.log(math.pi)
    decided = (mixed + both * math.log(2) >= math.log(classes / alpha)).numpy()
    return np.where(decided, np.sign(right - rivals), 0).astype(np.int8)


# -- `Certificates`: what is proved for each image, what attacks have refuted, and the report on both ------------------

FORMAT = 4
#: The columns of the table.
HEAD = ("L2 radius", "robust accuracy", "all together", "certified", "no certificate", "undecided", "refuted")
NORMAL = NormalDist()
#: The columns of a log, in the format of Cohen et al.'s code (locuslab/smoothing): the index in the data set; the
#: label, -1 if it is unknown; the proved class, -1 where the classifier abstains; its L2 radius, also of a wrong class;
#: 1 if it is the label; and the time of the draws. Files of other programs end here. Then the tested class, the draws
#: with this class, and the draws that count. An unfinished image has no line.
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time", "tested", "right", "draws")
PUBLIC = 6
#: The values of `Certificates.predicted` that are no class.
ABSTAINS, UNFINISHED = -1, -2
#: The arrays of whole numbers. `decided` is ``[N, questions, 2]``, and the others are ``[N]``.
ARRAYS = ("right", "draws", "index", "labels", "tested", "decided")


@dataclass(frozen=True, eq=False)
class Certificates:
    """The certificates of images for a smoothed classifier, from `purify_fast.evaluation.certify`.

    Attributes:
        right: for each image, the number of draws with the tested class, int64 ``[N]``.
        draws: for each image, the number of draws, int64 ``[N]``.
        sigma: standard deviation of the noise, in image units.
        radii: the L2 radii in image units about which was asked; empty if each image has its largest radius.
        alpha: the largest probability of a wrong certificate, for each image and all its radii together.
        refuted: by radius, the images whose label is less frequent than another class at the image itself, or at an
            attacked image within this L2 distance, bool ``[N]``. It is proved with the same probability.
        about: facts, such as ``name``, ``precision``, ``predicted_by``, ``version``, ``seed`` and ``seconds``.
        notes: remarks, each a sentence.
        index: the images' indices in their data set, int64 ``[N]``. None: 0 to N - 1.
        labels: the labels, int64 ``[N]``; -1 for an unknown label. None: all are unknown.
        tested: the class of which the draws are counted, int64 ``[N]``. None: the labels.
        decided: the draws with the tested class and the draws at the look that counts, int64 ``[N, questions, 2]``: for
            each of `radii`, the look that answered, or the last; for the largest radius, the look after all draws. It
            has 0 draws where the image is unfinished. None: all draws were counted in a single look.

    Raises:
        ValueError: a setting is not allowed, or the counts are none of so many draws.
        TypeError: an array has no whole numbers.
    """

    right: NDArray[np.int64]
    draws: NDArray[np.int64]
    sigma: Annotated[float, Range(0, 4, above=True, unit=" in image units, for images in [0, 1]")]
    radii: tuple[Annotated[float, Range(0, below=True)], ...]
    alpha: Annotated[float, Range(0, 0.5, above=True)]
    refuted: dict[float, NDArray[np.bool_]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    index: NDArray[np.int64] = None  # type: ignore[assignment]
    labels: NDArray[np.int64] = None  # type: ignore[assignment]
    tested: NDArray[np.int64] = None  # type: ignore[assignment]
    decided: NDArray[np.int64] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_types(self)
        n, questions = np.size(self.right), max(1, len(self.radii))
        labels = np.full(n, -1) if self.labels is None else self.labels
        counts = np.stack([self.right, self.draws], -1)[:, None].repeat(questions, 1)
        usual = {"index": np.arange(n), "labels": labels, "tested": np.array(labels), "decided": counts}
        for name in ARRAYS:
            shape = (n, questions, 2) if name == "decided" else (n,)
            array = np.asarray(usual[name] if getattr(self, name) is None else getattr(self, name))
            vars(self)[name] = array.astype(np.int64, casting="safe", copy=False).reshape(shape)
        refuted = {float(at): np.asarray(fallen, dtype=np.bool_).reshape(n) for at, fallen in self.refuted.items()}
        vars(self).update(sigma=float(self.sigma), alpha=float(self.alpha), radii=tuple(map(float, self.radii)))
        vars(self).update(refuted=refuted)
        if len(np.unique(self.index)) < n or self.index.min() < 0 or self.index.max() >= LARGEST:
            raise ValueError(f"index must be another number in [0, {LARGEST}) for each image, got {self.index}")
        right, draws = np.moveaxis(self.decided, -1, 0)
        if not ((right >= 0) & (right <= draws) & (draws <= self.draws[:, None])).all():
            raise ValueError(f"right and draws must be counts of draws, got {self.decided}")

    def threshold(self, radius: float) -> float:
        """The probability of the class that a certificate at a radius needs: Phi(radius / sigma)."""
        return NORMAL.cdf(radius / self.sigma)

    def answers(self) -> NDArray[np.int8]:
        """The answers at `radii` for the tested class, as `answers` gives them, int8 ``[N, radii]``."""
        return answers(self.decided, [*map(self.threshold, self.radii)], self.alpha)

    def reached(self) -> Floats:
        """The largest radius that is proved for the tested class, float64 ``[N]``; below 0 if there is none."""
        if self.radii:
            return np.asarray(np.where(self.answers() == 1, self.radii, -np.inf).max(1))
        bounds = torch.from_numpy(lower_bounds(self.decided[:, 0], self.alpha))
        return np.asarray(self.sigma * torch.special.ndtri(bounds).numpy())

    def _held(self) -> Floats:
        """The largest radius that is proved for the label, or for the tested class of an unknown label."""
        return np.where((self.labels == self.tested) | (self.labels < 0), self.reached(), -np.inf)

    @property
    def probability(self) -> Floats:
        """The proved probability (p_A) of the label or of the tested class, float64 ``[N]``; 0 for a wrong class."""
        return np.array([*map(self.threshold, self._held().tolist())])

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class that the smoothed classifier is proved to predict, int64 ``[N]``; -1 where it abstains.

        -2 is an unfinished image: its draws ended before all its answers, because the time was over.
        """
        return np.where(self.unfinished, UNFINISHED, np.where(self.reached() >= 0, self.tested, ABSTAINS))

    @property
    def unfinished(self) -> NDArray[np.bool_]:
        """The images with a question for which no look counts, bool ``[N]``."""
        return np.asarray((self.decided[..., 1] == 0).any(1))

    @property
    def radius(self) -> Floats:
        """For each image, the largest L2 radius that is proved, in image units, float64 ``[N]``.

        It is 0 where the classifier abstains or predicts another class than the label; `predicted` tells both apart.
        With `radii`, it is the largest of those that are certified, and its mean is not the average certified radius.
        """
        return np.maximum(self._held(), 0.0)

    def certified(self, radius: float) -> NDArray[np.bool_]:
        """The images that are certified at a radius, bool ``[N]``.

        Raises:
            ValueError: the radius is above all of `radii`.
        """
        if self.radii and not radius <= max(self.radii):
            raise ValueError(f"radius must be at most {max(self.radii)}, the largest that certify got, got {radius}")
        return np.asarray(self._held() >= radius)

    def decisions(self, radius: float) -> NDArray[np.int8]:
        """Decide each image at a radius, int8 ``[N]``: 1 if it is certified, -1 if it cannot be, 0 if this is open.

        An image cannot be certified if another class than its label is certified, or if the model's probability of the
        tested class is not above the threshold. The smoothed classifier may still be robust there.
        """
        absent = (self.predicted >= 0) & ~self.certified(0.0)
        if self.radii:
            # The absence of a certificate holds also within a larger ball.
            absent |= (self.answers()[:, np.array(self.radii) <= radius] == -1).any(1)
        return np.where(self.certified(radius), 1, -absent.astype(np.int8)).astype(np.int8)

    @property
    def log(self) -> dict[str, NDArray[Any]]:
        """The columns of `COLUMNS`, for each finished image. An image's time is its share of all draws."""
        draws, reached = self.draws + int(self.about.get("choosing_draws", 0)), np.maximum(self.reached(), 0.0)
        seconds = float(self.about.get("seconds", 0)) * draws / max(1, draws.sum())
        correct = ((self.predicted == self.labels) & (self.labels >= 0)).astype(int)
        public = (self.index, self.labels, self.predicted, reached, correct, seconds)
        columns = zip(COLUMNS, (*public, self.tested, self.right, self.draws), strict=True)
        return {name: column[~self.unfinished] for name, column in columns}

    @property
    def acr(self) -> float:
        """The average certified radius: the mean of `radius`. It needs all labels and all largest radii."""
        if self.radii or (self.unfinished | (self.labels < 0)).any():
            raise ValueError("acr needs labels, and the largest radii: certify without radius, and finish all images")
        return float(self.radius.mean())

    def accuracy_at(self, radii: Sequence[float]) -> Floats:
        """The certified accuracy at radii: the shares of images with the right class and at least this radius.

        `between` has the lower bound at another radius, and for unfinished images.

        Raises:
            ValueError: a radius is none of `radii`, or an image is unfinished.
        """
        if unknown := self._unknown(radii):
            raise ValueError(f"accuracy_at needs finished images, and radii that certify got, which {unknown} are not")
        return np.array([self.certified(radius).mean() for radius in radii])

    def _unknown(self, radii: Sequence[float]) -> list[float]:
        """The radii about which some image has no answer."""
        return [radius for radius in radii if self.unfinished.any() or radius not in (self.radii or radii)]

    @property
    def shown(self) -> tuple[float, ...]:
        """The radii of the table: `radii`, or multiples of sigma up to the largest radius of an image."""
        steps = int(max(1, self.radius.max() / self.sigma))
        return self.radii or tuple(step * self.sigma for step in range(steps + 1))

    def _fell(self) -> Floats:
        """The smallest radius at which each image is refuted, float64 ``[N]``; infinity if there is none."""
        fell = [np.where(refuted, radius, np.inf) for radius, refuted in self.refuted.items()]
        return np.min([np.full(len(self.draws), np.inf), *fell], axis=0)

    def _numbers(self, radius: float) -> tuple[int, int, int]:
        """The numbers of images that are certified, that are so for all images together, and that are not refuted.

        Each certificate may be wrong, so a few of many are. Except with a probability of at most `alpha`, they are at
        most as many as `most_wrong` says, at all radii at the same time. These are subtracted for all images together.
        Nothing is said about images that are not here.
        """
        good = int(self.certified(radius).sum())
        return good, max(0, good - most_wrong(len(self.draws), self.alpha)), int((self._fell() > radius).sum())

    def between(self, radius: float) -> tuple[float, float]:
        """The robust accuracy of the smoothed classifier at a radius, from below and from above, in [0, 1].

        Below: the share of certified images. Above: the share that is not refuted within the radius.
        """
        low, _, high = self._numbers(radius)
        return low / len(self.draws), high / len(self.draws)

    def contradictions(self, radius: float) -> NDArray[np.int64]:
        """The places of images that are certified and refuted at a radius up to this one: one of both is wrong."""
        return np.flatnonzero(self._fell() <= np.minimum(self._held(), radius))

    def sentence(self, radius: float, together: bool = False) -> str:
        """The robust accuracy at a radius in words, such as ``between 41.0 and 47.0 %``, rounded outwards.

        ``together``: the bound for all images together.
        """
        n, (low, sure, high) = len(self.draws), self._numbers(radius)
        # Whole numbers are divided exactly. The last zero of two decimals is left out.
        parts = (10_000 * (sure if together else low) // n, -(-10_000 * high // n))
        least, most = (f"{part // 100}.{part % 100:02}".removesuffix("0") for part in parts)
        if together or not any(tried <= radius for tried in self.refuted):
            return f"at least {least} %"
        return f"{least} %" if least == most else f"between {least} and {most} %"

    def to_json(self) -> str:
        """The certificates as JSON."""
        accuracy = {str(r): [self.sentence(r), self.sentence(r, together=True)] for r in self.shown}
        content = {"format": FORMAT, **vars(self), "accuracy": accuracy}
        return json.dumps(content, default=np.ndarray.tolist, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificates:
        """Read certificates from the result of `to_json`. All decisions are computed again from the counts.

        Raises:
            ValueError: another format, or a field has a value that is not allowed.
            KeyError: a field is missing.
        """
        content: Any = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"the certificates must have format {FORMAT}: certify again")
        return cls(**{field.name: content[field.name] for field in fields(cls)})

    def lines(self) -> list[tuple[str, ...]]:
        """A line of the report's table for each radius: radius, accuracy, and counts of images."""
        rows = []
        for radius in self.shown:
            decisions = self.decisions(radius)
            counts = [str((decisions == decision).sum()) for decision in (1, -1, 0)]
            counts.append(str(self.refuted[radius].sum()) if radius in self.refuted else "-")
            rows.append((str(radius), self.sentence(radius), self.sentence(radius, together=True), *counts))
        return rows

    def summary(self, radii: Sequence[float]) -> dict[str, str]:
        """The line of a table of the certified accuracy at some radii, by its columns. A dash: it is not known."""
        n, parts = len(self.draws), ["-"] * 4
        images = str(n) + f", {self.unfinished.sum()} unfinished" * bool(self.unfinished.any())
        if not self.radii and not (self.unfinished | (self.labels < 0)).any():
            parts = [f"{value:.3f}" for value in (self.acr, *np.quantile(self.probability, [0.25, 0.5, 0.75]))]
        data = f" ({self.about['dataset']})" if "dataset" in self.about else ""
        row = {"model": self.about.get("name", "a model") + data, "sigma": str(self.sigma), "images": images}
        shares = {r: "-" if self._unknown([r]) else f"{10_000 * self._numbers(r)[0] // n / 100:.2f}" for r in radii}
        row |= {f"L2 {radius:g}": share for radius, share in shares.items()}
        row |= dict(zip(("ACR", "p_A 25 %", "p_A 50 %", "p_A 75 %"), parts, strict=True))
        return row | {"draws": f"{self.draws.sum():,}", "seconds": self.about.get("seconds", "-")}

    def to_latex(self, *others: Certificates, radii: Sequence[float] | None = None) -> str:
        """The lines of `summary` of these and of other certificates as a table in LaTeX, with the rules of booktabs."""
        shown = radii or sorted({*self.shown}.union(*(other.shown for other in others)))
        return latex_table([row.summary(shown) for row in (self, *others)])

    def to_text(self) -> str:
        """The report as text for a terminal."""
        return render("certificates.txt.jinja", **self._shown()).rstrip()

    def to_html(self) -> str:
        """The report as a HTML page that loads no other files, with the accuracy over the radius."""
        return render("certificates.html.jinja", **self._shown())

    def _shown(self) -> dict[str, Any]:
        """Return the values that the text and the page show. A curve has its corners: radii, and the shares beyond."""
        n, fell = len(self.draws), self._fell()
        above = [(0.0, 1.0), *((radius, (fell > radius).mean()) for radius in sorted(self.refuted))]
        # Each certified image ends at its radius. Nothing is known beyond the largest of `radii`.
        ends = sorted(self.radius[self.certified(0.0)].tolist())
        farthest = max(self.radii) if self.radii else max(*self.shown, *ends, *self.refuted)
        shown = [0.0, *(end for end in ends if not self.radii or end < farthest)]
        below = [(end, (len(ends) - at) / n) for at, end in enumerate(shown)]
        draws = f"{self.draws.sum():,} draws, in the median {int(np.median(self.draws)):,} for an image"
        curves = {"above": above, "below": below, "farthest": farthest or self.sigma}
        return {"report": self, "head": HEAD, "draws": draws, "summary": self.summary(sorted({*self.shown})), **curves}

    def save(self, folder: str | Path) -> None:
        """Write ``certificates.html``, ``.json`` and ``.txt``, and ``log.tsv``, atomically into a folder.

        Raises:
            ValueError: there are unfinished images, and the folder has certificates of which all are finished.
        """
        folder = Path(folder)
        check_folder("folder", folder)
        path = folder / "certificates.json"
        number = self.unfinished.sum()
        if number and path.exists() and not self.from_json(path.read_text(encoding="utf-8")).unfinished.any():
            raise ValueError(f"{folder} has finished certificates, which {number} unfinished would replace")
        self.about.setdefault("date", datetime.now().astimezone().isoformat(" ", "minutes"))
        write_text(path, self.to_json())
        write_text(folder / "certificates.txt", self.to_text() + "\n")
        write_text(folder / "certificates.html", self.to_html())
        # Radii have all digits of float64.
        log: dict[str, Any] = {name: map(str, column.tolist()) for name, column in self.log.items()}
        log["time"] = (f"{s // 3600:.0f}:{s % 3600 // 60:02.0f}:{s % 60:09.6f}" for s in self.log["time"].tolist())
        write_text(folder / "log.tsv", "\n".join(map("\t".join, [COLUMNS, *zip(*log.values(), strict=True)])) + "\n")


def read_log(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read a log of this package or of another program. Return the columns ``[N]`` by name; times are in seconds.

    Raises:
        ValueError: the file has other columns, or a value that is not allowed.
    """
    head, *lines = (line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines())
    if tuple(head) not in (COLUMNS, COLUMNS[:PUBLIC]) or any(len(line) != len(head) for line in lines):
        raise ValueError(f"{path} must have lines with the columns {', '.join(COLUMNS)}, or the first {PUBLIC}")
    kinds: dict[str, Any] = {"radius": float, "time": _seconds}
    try:
        return {
            name: np.array([*map(kinds.get(name, int), column)]) for name, *column in zip(head, *lines, strict=True)
        }
    except ValueError as error:
        raise ValueError(f"{path} has a value that is not allowed: {error}") from error


def _seconds(text: str) -> float:
    return sum(float(part) * 60**place for place, part in enumerate(reversed(text.split(":"))))
