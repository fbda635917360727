"""`Certificates`: what is proved for each image, what attacks have refuted, and the report on both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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
#: The arrays of whole numbers. `decided` is ``[N, radii, 2]``, and the others are ``[N]``.
ARRAYS = ("right", "draws", "index", "decided")


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
        if not self.radii:
            raise ValueError("radii must be at least one number, got none")
        if self.index is None:
            object.__setattr__(self, "index", np.arange(len(self.right)))
        if self.decided is None:
            last = np.stack([self.right, self.draws], 1)
            object.__setattr__(self, "decided", np.repeat(last[:, None], len(self.radii), 1))
        n = len(self.right)
        arrays: list[tuple[str, Any, type]] = [(name, getattr(self, name), np.int64) for name in ARRAYS]
        arrays += [(f"refuted at {radius}", each, np.bool_) for radius, each in self.refuted.items()]
        for name, array, kind in arrays:
            shape = (n, len(self.radii), 2) if name == "decided" else (n,)
            if array.dtype != kind or array.shape != shape or not array.size:
                raise ValueError(f"{name} must be {kind.__name__} {[*shape]}, got {array.dtype} {[*array.shape]}")
        right, draws = self.decided[..., 0], self.decided[..., 1]
        again = np.unique(self.index, return_index=True)[1]
        for name, allowed, good in (
            ("draws", f"in [0, {MOST}]", (self.draws >= 0) & (self.draws <= MOST)),
            ("right", "in [0, draws]", (self.right >= 0) & (self.right <= self.draws)),
            ("index", f"in [0, {LARGEST})", (self.index >= 0) & (self.index < LARGEST)),
            ("index", "another number for each image", np.isin(np.arange(n), again)),
            # The draws of a look are some of the image's draws.
            ("decided", "right draws and draws of a look", (right >= 0) & (right <= draws)),
            ("decided", "at most the right draws", right <= self.right[:, None]),
            ("decided", "at most the wrong draws", draws - right <= (self.draws - self.right)[:, None]),
        ):
            if not good.all():
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)[~good][0].tolist()}")

    def threshold(self, radius: float) -> float:
        """The probability of the label that a certificate at a radius needs: Phi(radius / sigma)."""
        return NORMAL.cdf(radius / self.sigma)

    def decisions(self, radius: float) -> NDArray[np.int8]:
        """Decide each image at a radius, int8 ``[N]``: 1 if it is certified, -1 if it cannot be, 0 if this is open.

        An image cannot be certified if the model's probability of its label is below the threshold. The smoothed
        classifier may still be robust there. An answer at one of `radii` stays, whatever the later draws were.
        """
        found = answers(self.right.astype(float), self.draws.astype(float), self.threshold(radius), self.alpha)
        for k, asked in enumerate(self.radii):
            right, draws = self.decided[:, k].astype(float).T
            then = answers(right, draws, self.threshold(asked), self.alpha)
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
        lower, _ = bounds(self.right.astype(float), self.draws.astype(float), self.alpha)
        proved = [np.array([self.sigma * NORMAL.inv_cdf(p) if p > 0.5 else 0.0 for p in lower.tolist()])]
        return np.maximum.reduce(proved + [asked * self.certified(asked) for asked in self.radii])

    def _numbers(self, radius: float) -> tuple[int, int]:
        """The numbers of certified images, and of images that no attack within the radius has refuted."""
        fallen = [refuted for tried, refuted in self.refuted.items() if tried <= radius]
        gone = np.logical_or.reduce(fallen) if fallen else np.zeros(len(self.draws), dtype=bool)
        return int(self.certified(radius).sum()), int((~gone).sum())

    def between(self, radius: float) -> tuple[float, float]:
        """The robust accuracy of the smoothed classifier at a radius, from below and from above, in [0, 1].

        Below: the share of certified images. Above: the share that no attack within the radius has refuted.
        """
        low, high = self._numbers(radius)
        return low / len(self.draws), high / len(self.draws)

    @property
    def wrong(self) -> int:
        """The largest number of wrong certificates among all images, except with a probability of at most alpha."""
        return most_wrong(len(self.draws), self.alpha)

    def at_least(self, radius: float) -> float:
        """A lower bound, in [0, 1], for the share of these images that are robust, for all images together.

        Robust: the smoothed classifier predicts the label in the whole ball. All such bounds, at all radii, hold at the
        same time except with a probability of at most `alpha`. It is the share of certified images less those that may
        be `wrong`. It says nothing about images that were not drawn.
        """
        return max(0, self._numbers(radius)[0] - self.wrong) / len(self.draws)

    def contradictions(self, radius: float) -> NDArray[np.int64]:
        """The places of images that are certified and refuted at a radius up to this one: one of both is wrong."""
        both = [self.certified(tried) & refuted for tried, refuted in self.refuted.items() if tried <= radius]
        return np.flatnonzero(np.logical_or.reduce(both)) if both else np.array([], dtype=np.int64)

    def sentence(self, radius: float) -> str:
        """The robust accuracy at a radius in words, such as ``between 41.0 and 47.0 %``, rounded outwards."""
        low, high = self._numbers(radius)
        attacked = any(tried <= radius for tried in self.refuted)
        return f"between {self._percent(low)} and {self._percent(high, up=True)} %" if attacked else self._least(low)

    def together(self, radius: float) -> str:
        """The bound of `at_least` in words."""
        return self._least(max(0, self._numbers(radius)[0] - self.wrong))

    def _least(self, count: int) -> str:
        return f"at least {self._percent(count)} %"

    def _percent(self, count: int, up: bool = False) -> str:
        # Whole numbers are divided exactly. The last zero of two decimals is left out.
        hundredths = (10_000 * count + (len(self.draws) - 1) * up) // len(self.draws)
        return f"{hundredths // 100}.{hundredths % 100:02}".removesuffix("0")

    def to_json(self) -> str:
        """The certificates as JSON."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content |= {name: array.tolist() for name, array in content.items() if name in ARRAYS}
        content["refuted"] = {str(radius): each.astype(int).tolist() for radius, each in self.refuted.items()}
        words = {str(radius): [self.sentence(radius), self.together(radius)] for radius in self.radii}
        return json.dumps({"format": FORMAT, **content, "accuracy": words}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificates:
        """Read certificates from the result of `to_json`. ValueError: another format, or a field that is not allowed.

        All decisions are computed again from the counts.
        """
        content: Any = json.loads(text)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"the certificates must have format {FORMAT}: certify again")
        if other := sorted({*content} ^ {*cls.__dataclass_fields__, "accuracy"}):
            raise ValueError(f"certificates must have each of their fields once, got too few or too many: {other}")
        del content["accuracy"]
        for name, kind in (("radii", list), ("about", dict), ("refuted", dict), ("notes", list)):
            if not isinstance(content[name], kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {content[name]!r}")
        for name, value in [*content["about"].items(), *(("notes", each) for each in content["notes"])]:
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a string, got {value!r}")
        content |= {name: _whole(name, content[name]) for name in ARRAYS}
        refuted = content["refuted"].items()
        content["refuted"] = {_number(at): _whole(f"refuted at {at}", each, most=1) == 1 for at, each in refuted}
        return cls(**content | {"radii": tuple(content["radii"])})

    def lines(self) -> list[tuple[str, ...]]:
        """A line of the report's table for each radius: radius, accuracy, and counts of images."""
        rows = []
        for radius in self.radii:
            decided = self.decisions(radius)
            counts = [int((decided == each).sum()) for each in (1, -1, 0)]
            refuted = self.refuted.get(radius)
            rows.append(
                (
                    str(radius),
                    self.sentence(radius),
                    self.together(radius),
                    *map(str, counts),
                    "-" if refuted is None else str(int(refuted.sum())),
                )
            )
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"each radius of refuted must be a number, got {text!r}") from error


def _whole(name: str, value: Any, most: int = LARGEST) -> NDArray[np.int64]:
    """An array of whole numbers in [0, most] from the lists of a file."""
    try:
        array = np.array(value)
    # The lists have different lengths.
    except ValueError:
        array = np.array(None)
    if array.dtype.kind != "i" or array.min(initial=0) < 0 or array.max(initial=0) > most:
        raise ValueError(f"{name} must be whole numbers in [0, {most}], in lists of equal lengths, got {value!r:.80}")
    return array.astype(np.int64)
