"""`Certificates`: what is proved for each image, what attacks have refuted, and the report on both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from ..._files import write_text
from ..._validation import Positive, Range, check_folder, check_types
from ..show.text import render
from .sequences import LARGEST, MOST, Floats, answers, bounds, most_wrong

FORMAT = 2
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


#: The arrays of whole numbers. `decided` is ``[N, radii, 2]``, and the others are ``[N]``.
ARRAYS = ("right", "draws", "index", "decided")
#: The fields of a file: what each must be, and how it is read. The object's own checks follow.
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(ARRAYS, ("whole numbers in lists of equal lengths", lambda lists: _read(int, lists))),
    **dict.fromkeys(("sigma", "alpha"), ("a number", lambda value: value)),
    "radii": ("a list of numbers", tuple),
    "refuted": ("lists of true and false by radius", lambda by: {float(at): _read(bool, by[at]) for at in by}),
    "about": ("texts by name", lambda texts: dict(zip(texts, _read(str, [*texts.values()]).tolist(), strict=True))),
    "notes": ("a list of texts", lambda texts: _read(str, texts).tolist()),
}


@dataclass(frozen=True, eq=False)
class Certificates:
    """The certificates of images for a smoothed classifier, from `purify_fast.evaluation.certify`.

    Attributes:
        right: for each image, the number of draws with the right class, int64 ``[N]``.
        draws: for each image, the number of draws, int64 ``[N]``.
        sigma: standard deviation of the noise, in image units.
        radii: the L2 radii in image units about which was asked.
        alpha: the largest probability of a wrong certificate, for each image and all its radii together.
        refuted: by radius, the images for which an attack has found an image within this L2 distance where another
            class is more frequent than the label, bool ``[N]``. It is proved with the same probability.
        about: facts, such as ``name``, ``precision``, ``predicted_by``, ``version``, ``seed`` and ``seconds``.
        notes: remarks, each a sentence.
        index: the images' indices in their data set, int64 ``[N]``. None: 0 to N - 1.
        decided: for each image and each of `radii`, the right draws and the draws at the look that answered the
            question, or at the last look, int64 ``[N, radii, 2]``. None: all draws were counted in a single look.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    right: NDArray[np.int64]
    draws: NDArray[np.int64]
    sigma: Positive
    radii: tuple[Radius, ...]
    alpha: Annotated[float, Range(0, 1, above=True, below=True)]
    refuted: dict[float, NDArray[np.bool_]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    index: NDArray[np.int64] = None  # type: ignore[assignment]
    decided: NDArray[np.int64] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_types(self)
        for radius in self.refuted:
            Range(0, below=True).check("each radius of refuted", radius)
        n, arrays = len(self.right), dict[str, Any]({f"refuted[{at}]": each for at, each in self.refuted.items()})
        for name in (*arrays, *ARRAYS):
            if getattr(self, name, name) is None:
                counted = np.arange(n) if name == "index" else self._drawn().repeat(len(self.radii), 1)
                object.__setattr__(self, name, counted)
            array: Any = arrays.setdefault(name, getattr(self, name, None))
            shape = (n, len(self.radii), 2) if name == "decided" else (n,)
            kind = np.int64 if name in ARRAYS else np.bool_
            if array.dtype != kind or array.shape != shape or not array.size:
                raise ValueError(f"{name} must be {kind.__name__} {[*shape]}, got {array.dtype} {[*array.shape]}")
        look, rest, first = self.decided, self._drawn() - self.decided, np.unique(self.index, return_index=True)[1]
        for name, allowed, good in (
            ("right", f"from 0 to the draws, at most {MOST}", _fits(self._drawn()[:, 0]) & (self.draws <= MOST)),
            ("index", f"in [0, {LARGEST})", (self.index >= 0) & (self.index < LARGEST)),
            ("index", "another number for each image", np.isin(np.arange(n), first)),
            # The draws of a look are some of the image's draws, right ones and wrong ones.
            ("decided", "right draws and draws of a look, some of the image's", _fits(look) & _fits(rest)),
        ):
            if not good.all():
                raise ValueError(f"{name} must be {allowed}, got {arrays[name][~good][0].tolist()}")

    def _drawn(self) -> NDArray[np.int64]:
        """All right draws and all draws, int64 ``[N, 1, 2]``."""
        return np.stack([self.right, self.draws], -1)[:, None]

    def threshold(self, radius: float) -> float:
        """The probability of the label that a certificate at a radius needs: Phi(radius / sigma)."""
        return NORMAL.cdf(radius / self.sigma)

    def decisions(self, radius: float) -> NDArray[np.int8]:
        """Decide each image at a radius, int8 ``[N]``: 1 if it is certified, -1 if it cannot be, 0 if this is open.

        An image cannot be certified if the model's probability of its label is below the threshold. The smoothed
        classifier may still be robust there. An answer at one of `radii` stays, whatever the later draws were.
        """
        found = answers(self.right, self.draws, self.threshold(radius), self.alpha)
        for asked, look in zip(self.radii, self.decided.transpose(1, 2, 0), strict=True):
            then = answers(look[0], look[1], self.threshold(asked), self.alpha)
            # A certificate holds also within a smaller ball, and its absence also within a larger one.
            found = np.where(((then == 1) & (asked >= radius)) | ((then == -1) & (asked <= radius)), then, found)
        return found

    def certified(self, radius: float) -> NDArray[np.bool_]:
        """The images that are certified at a radius, bool ``[N]``."""
        return np.asarray(self.decisions(radius) == 1)

    @property
    def radius(self) -> Floats:
        """For each image, the largest L2 radius that these draws prove, in image units, float64 ``[N]``; 0 if none.

        This is not the image's certified radius as other papers report it. The draws of an image end when `radii` are
        decided, so its certificate often reaches only a little beyond them, and the mean of these numbers is far below
        the average certified radius.
        """
        lower, _ = bounds(self.right, self.draws, self.alpha)
        proved = [np.array([self.sigma * NORMAL.inv_cdf(p) if p > 0.5 else 0.0 for p in lower.tolist()])]
        return np.maximum.reduce(proved + [asked * self.certified(asked) for asked in self.radii])

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
        accuracy = {str(each): [self.sentence(each), self.sentence(each, together=True)] for each in self.radii}
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
        for radius in self.radii:
            counts = [str((self.decisions(radius) == each).sum()) for each in (1, -1, 0)]
            counts.append(str(self.refuted[radius].sum()) if radius in self.refuted else "-")
            rows.append((str(radius), self.sentence(radius), self.sentence(radius, together=True), *counts))
        return rows

    def to_text(self) -> str:
        """The report as text for a terminal."""
        median = int(np.median(self.draws))
        return render("certificates.txt.jinja", report=self, head=HEAD, median=median).rstrip()

    def to_html(self) -> str:
        """The report as a HTML page that loads no other files, with the accuracy over the radius."""
        draws = f"{self.draws.sum():,}, in the median {int(np.median(self.draws)):,} for an image"
        facts = {"draws": draws, **{name.replace("_", " "): value for name, value in self.about.items()}}
        drawing = self._drawing()
        return render("certificates.html.jinja", report=self, head=HEAD, drawing=drawing, facts=facts)

    def _drawing(self) -> dict[str, Any]:
        """The corners of both curves, as pairs of a radius and a share, up to a little more than the largest radius."""
        proved, most = self.radius, 1.05 * (max(self.radii) or self.sigma)
        below = [(0.0, float((proved > 0).mean()))]
        for at in np.unique(proved[(proved > 0) & (proved < most)]).tolist():
            below += [(at, below[-1][1]), (at, float((proved > at).mean()))]
        above = [(0.0, 1.0)]
        for at in sorted(self.refuted):
            above += [(at, above[-1][1]), (at, self.between(at)[1])]
        return {"most": most, "below": [*below, (most, below[-1][1])], "above": [*above, (most, above[-1][1])]}

    def save(self, folder: str | Path) -> None:
        """Write ``certificates.html``, ``certificates.json`` and ``certificates.txt`` atomically into a folder."""
        folder = Path(folder)
        check_folder("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.about.setdefault("date", datetime.now().astimezone().isoformat(" ", "minutes"))
        write_text(folder / "certificates.json", self.to_json())
        write_text(folder / "certificates.txt", self.to_text() + "\n")
        write_text(folder / "certificates.html", self.to_html())
