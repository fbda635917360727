"""Witnesses: the adversarial images of a report, stored in a file, so that anybody can check them later.

For an image that fell, the witness is the attacked image that the model misclassified. `evaluate` with ``keep="all"``
stores the witness of every fallen image, exactly as the model got it. `check_witnesses` tests all witnesses again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._sealed import read_sealed, write_sealed
from ..._tensors import digest, weights_fingerprint
from ...attacks.base import ThreatModel
from ...attacks.outputs import LogitsOf
from ...protocols import Classifier
from ..asked.specs import ROUNDING, moved
from .rows import Row, by_worst_points

#: The name begins with "report.", so that the file is moved together with the other files of the report.
FILE = "report.witnesses.safetensors"
FORMAT = 2
#: The names of the tensors in the file.
TENSORS = ("clean", "adversarial", "labels", "numbers", "margins", "attacks")
#: The length of a witness's checksum, in characters.
SHORT = 12


def model_marks(model: Classifier, mark: str | None) -> dict[str, str | None]:
    """The hashes that identify a model: a hash of its weights, and its fingerprint."""
    inner = model.model if isinstance(model, LogitsOf) else model
    weights = weights_fingerprint(inner) if isinstance(inner, nn.Module) else None
    return {"weights": weights, "fingerprint": mark}


@dataclass(frozen=True)
class Witnesses:
    """The witnesses of an evaluation: one adversarial image for each image that fell, within each threat model.

    Args:
        clean: the clean image of each witness, float32 ``[W, C, H, W]`` in [0, 1].
        adversarial: the witnesses, float32 ``[W, C, H, W]``.
        labels: the true classes, int64 ``[W]``.
        numbers: the index of each image in the evaluated data, int64 ``[W]``.
        margins: the true logit minus the largest other logit, averaged over the draws, float32 ``[W]``; negative for a
            misclassified witness.
        attacks: the index of the attack that found each witness, in the list ``about["attacks"]``, int64 ``[W]``.
        about: plain values: the model's hashes and number of classes, ``random``, ``n_eval``, ``predict``, ``seed``,
            and ``attacks`` with their balls.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    numbers: Tensor
    margins: Tensor
    attacks: Tensor
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def summary(self) -> dict[str, Any]:
        """The facts about the witnesses that the report stores: their number, and checksums that reveal changes."""
        parts = (self.clean, self.adversarial, self.labels, self.numbers, self.attacks)
        each = [digest(*witness)[:SHORT] for witness in zip(*parts, strict=True)]
        checksums = {"clean": digest(self.clean), "adversarial": digest(self.adversarial)}
        return {"file": FILE, "count": len(self)} | checksums | {"each": each, "attacks": self.about["attacks"]}

    def outside(self) -> Tensor:
        """Tell which witnesses are outside the ball or [0, 1] by more than rounding, or contain NaN, bool ``[W]``."""
        images = self.adversarial
        outside = ~((images >= -ROUNDING) & (images <= 1 + ROUNDING)).flatten(1).all(1)
        for number, attack in enumerate(self.about["attacks"]):
            mine = self.attacks == number
            how_far = moved(images[mine], self.clean[mine], ThreatModel(attack["norm"], attack["eps"]))
            if how_far is not None:
                outside[mine] |= how_far[0] > how_far[1]
        return outside

    def save(self, folder: Path) -> None:
        """Write the file atomically."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        write_sealed(folder / FILE, {"format": FORMAT, "about": self.about}, tensors)

    @classmethod
    def load(cls, folder: Path) -> Witnesses:
        """Read the file."""
        try:
            content, tensors = read_sealed(folder / FILE)
            if content["format"] != FORMAT:
                raise ValueError(f"the format is {content['format']!r}, but this version reads format {FORMAT}")
            return cls(**{name: tensors[name] for name in TENSORS}, about=content["about"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / FILE} cannot be read: {error}") from error


def gathered(rows: Sequence[Row], about: Mapping[str, Any]) -> Witnesses | None:
    """Gather the witnesses from the rows of an evaluation with ``keep="all"``; None if no image fell."""
    clean = next(row for row in rows if row.kind == "clean" and row.deployed)
    deployed = [row for row in rows if row.is_attack and row.deployed and row.examples is not None]
    # For each threat model and image: the row and the position in the row's examples.
    places: dict[tuple[str | None, int], tuple[Row, int]] = {}
    for row in deployed:
        kept = row.examples
        assert kept is not None
        if kept.index is None:
            continue
        fallen = np.flatnonzero(kept.fell)
        if clean.wrong is not None:
            # A later point of an image is worse than the earlier ones.
            places |= {(row.threat, int(kept.index[at])): (row, int(at)) for at in fallen}
            continue
        for at in fallen[clean.robust[kept.index[fallen]]]:
            places.setdefault((row.threat, int(kept.index[at])), (row, int(at)))
    if clean.wrong is not None:
        for threat in {row.threat for row in deployed}:
            mine = [row for row in deployed if row.threat == threat]
            n = max(row.n for row in mine)
            right = by_worst_points([clean, *(row for row in mine if row.n == n)], n).right == clean.n_eval
            for number in np.flatnonzero(right).tolist():
                places.pop((threat, number), None)
    found = [row for row in deployed if any(each is row for each, _ in places.values())]
    if not found:
        return None
    numbered = {id(row): number for number, row in enumerate(found)}
    ordered = sorted(((numbered[id(row)], at, row) for row, at in places.values()), key=lambda place: place[:2])
    parts = [_witness(row, at, number) for number, at, row in ordered]
    joined = (torch.from_numpy(np.stack(values)) for values in zip(*parts, strict=True))
    attacks = [{"attack": row.attack, "norm": row.settings["norm"], "eps": row.settings["eps"]} for row in found]
    return Witnesses(**dict(zip(TENSORS, joined, strict=True)), about={**about, "attacks": attacks})


def _witness(row: Row, at: int, attack: int) -> tuple[np.ndarray, ...]:
    """The entries of a witness in the tensors of `TENSORS`: an image among a row's examples, and its attack's index."""
    kept = row.examples
    assert kept is not None and kept.index is not None
    number = int(kept.index[at])
    margin = np.float32(0 if row.margins is None else row.margins[number])
    entries = (kept.clean[at], kept.adversarial[at], kept.labels[at], np.int64(number), margin, np.int64(attack))
    return tuple(np.asarray(entry) for entry in entries)


def load_witnesses(report: str | Path) -> tuple[Witnesses, list[bool]]:
    """Read the witnesses of a saved report, and tell for each whether it has changed since the report was saved."""
    path = Path(report) / "report.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["witnesses"]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except KeyError:
        raise ValueError(f'{path} has no witnesses: no image fell, or keep="all" (--keep all) was not set') from None
    witnesses = Witnesses.load(path.parent)
    each, same = witnesses.summary()["each"], named["attacks"] == witnesses.about["attacks"]
    if len(each) != len(named["each"]):
        raise ValueError(f"{path} names {len(named['each'])} witnesses, but its file has {len(each)}")
    return witnesses, [one != other or not same for one, other in zip(each, named["each"], strict=True)]
