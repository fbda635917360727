"""`Certificates`: what is proved for each image, what attacks have refuted, and the report on both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._files import write_text
from ..._validation import check_folder
from ..show.text import render
from .sequences import Floats, answers, bounds

FORMAT = 1
#: The columns of the table.
HEAD = ("L2 radius", "robust accuracy", "certified", "no certificate", "undecided", "refuted")
NORMAL = NormalDist()


@dataclass(frozen=True, eq=False)
class Certificates:
    """The certificates of images for a smoothed classifier, from `purify_fast.evaluation.certify`.

    Attributes:
        right: for each image, the number of draws with the right class, int64 ``[N]``.
        draws: for each image, the number of draws, int64 ``[N]``.
        sigma: standard deviation of the noise, in image units.
        radii: the L2 radii in image units about which was asked.
        alpha: the largest probability of a wrong certificate, for each image and all its radii together.
        refuted: by radius, the images for which an attack has found an image within this L2 distance that the smoothed
            classifier does not classify correctly, bool ``[N]``. It is proved with the same probability.
        about: facts, such as ``name``, ``seed``, ``most_draws``, ``seconds`` and ``protocol``.
        notes: remarks, each a sentence.
    """

    right: NDArray[np.int64]
    draws: NDArray[np.int64]
    sigma: float
    radii: tuple[float, ...]
    alpha: float
    refuted: dict[float, NDArray[np.bool_]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def threshold(self, radius: float) -> float:
        """The probability of the label that a certificate at a radius needs: Phi(radius / sigma)."""
        return NORMAL.cdf(radius / self.sigma)

    @property
    def thresholds(self) -> list[float]:
        """The probabilities that certificates at `radii` need."""
        return [self.threshold(radius) for radius in self.radii]

    def decisions(self, radius: float) -> NDArray[np.int8]:
        """Decide each image at a radius, int8 ``[N]``: 1 if it is certified, -1 if it cannot be, 0 if this is open.

        An image cannot be certified if the model's probability of its label is below the threshold. The smoothed
        classifier may still be robust there.
        """
        return answers(self.right.astype(float), self.draws.astype(float), self.threshold(radius), self.alpha)

    def certified(self, radius: float) -> NDArray[np.bool_]:
        """The images that are certified at a radius, bool ``[N]``."""
        return np.asarray(self.decisions(radius) == 1)

    @property
    def radius(self) -> Floats:
        """For each image, the largest L2 radius that is proved, in image units, float64 ``[N]``; 0 if none is.

        The draws end when `radii` are decided, so a radius is often larger than the number here.
        """
        lower, _ = bounds(self.right.astype(float), self.draws.astype(float), self.alpha)
        return np.array([self.sigma * NORMAL.inv_cdf(p) if p > 0.5 else 0.0 for p in lower.tolist()])

    def between(self, radius: float) -> tuple[float, float]:
        """The robust accuracy of the smoothed classifier at a radius, from below and from above, in [0, 1].

        Below: the share of certified images. Above: the share that no attack within the radius has refuted.
        """
        fallen = [refuted for tried, refuted in self.refuted.items() if tried <= radius]
        gone = np.logical_or.reduce(fallen) if fallen else np.zeros(len(self.draws), dtype=bool)
        return float(self.certified(radius).mean()), 1 - float(gone.mean())

    def contradictions(self, radius: float) -> NDArray[np.int64]:
        """The indices of images that are certified and refuted at a radius up to this one: one of both is wrong."""
        both = [self.certified(tried) & refuted for tried, refuted in self.refuted.items() if tried <= radius]
        return np.flatnonzero(np.logical_or.reduce(both)) if both else np.array([], dtype=np.int64)

    def sentence(self, radius: float) -> str:
        """The robust accuracy at a radius in words, such as ``between 41.0 and 47.0 %``."""
        low, high = (f"{100 * each:.1f}" for each in self.between(radius))
        attacked = any(tried <= radius for tried in self.refuted)
        return f"between {low} and {high} %" if attacked else f"at least {low} %"

    def to_json(self) -> str:
        """The certificates as JSON."""
        content = asdict(self) | {
            "format": FORMAT,
            "right": self.right.tolist(),
            "draws": self.draws.tolist(),
            "refuted": [[radius, each.astype(int).tolist()] for radius, each in self.refuted.items()],
            "accuracy": {f"{radius:g}": self.sentence(radius) for radius in self.radii},
        }
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificates:
        """Read certificates from the result of `to_json`; ValueError for another format."""
        content: dict[str, Any] = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"the certificates must have format {FORMAT}: certify again")
        del content["accuracy"]
        content |= {name: np.array(content[name], dtype=np.int64) for name in ("right", "draws")}
        content["refuted"] = {radius: np.array(each, dtype=bool) for radius, each in content["refuted"]}
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
                    f"{radius:g}",
                    self.sentence(radius),
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
