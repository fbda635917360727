"""Witnesses: the adversarial images of a report, exactly as the model got them, in a file, to be checked later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._sealed import read_sealed, write_sealed
from ..._tensors import digest, weights_fingerprint
from ..._validation import Range, check_counts
from ...attacks import frozen
from ...attacks.base import ThreatModel
from ...protocols import Classifier
from ...speed.precision import whole_float32_by_default
from ..request.config import Predict
from ..request.fingerprint import fingerprint
from ..request.naming import ball_name
from ..request.specs import BALL_SLACK, moved
from ..request.subject import Subject
from ..results.rows import Row, by_worst_points
from .text import render

#: The name begins with "report.", so that the file is moved together with the other files of the report.
FILE = "report.witnesses.safetensors"
FORMAT = 2
#: The names of the tensors in the file.
TENSORS = ("clean", "adversarial", "labels", "numbers", "margins", "attacks")
#: The length of a witness's checksum, in characters.
SHORT = 12


def model_marks(model: Classifier, mark: str | None) -> dict[str, str | None]:
    """The hashes that identify a model: a hash of its weights, and its fingerprint."""
    weights = weights_fingerprint(model) if isinstance(model, nn.Module) else None
    return {"weights": weights, "fingerprint": mark}


@dataclass(frozen=True)
class Witnesses:
    """The witnesses of an evaluation: one adversarial image for each image that fell, within each threat model.

    ``numbers`` are the images' indices in the data, ``attacks`` those in ``about["attacks"]``; ``margins`` are averaged
    over the draws. ``about`` also has the model's hashes and number of classes, ``random``, ``n_eval``, ``predict`` and
    ``seed``.
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
        outside = ~((images >= -BALL_SLACK) & (images <= 1 + BALL_SLACK)).flatten(1).all(1)
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
        content, tensors = read_sealed(folder / FILE)
        if content["format"] != FORMAT:
            raise ValueError(f"{folder / FILE} must have format {FORMAT}, got {content['format']!r}: evaluate again")
        return cls(**tensors, about=content["about"])


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
        if clean.wrong is None:
            fallen = fallen[clean.robust[kept.index[fallen]]]
        points = {(row.threat, int(kept.index[at])): (row, int(at)) for at in fallen}
        # A later point of an image is worse than the earlier ones on a random model. Otherwise the first point counts.
        places = points | places if clean.wrong is None else places | points
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
    witnesses = list[tuple[Any, ...]]()
    for number, at, row in ordered:
        kept = row.examples
        assert kept is not None and kept.index is not None
        image = int(kept.index[at])
        margin = np.float32(0 if row.margins is None else row.margins[image])
        witnesses.append((kept.clean[at], kept.adversarial[at], kept.labels[at], np.int64(image), margin, number))
    joined = (torch.from_numpy(np.stack(values)) for values in zip(*witnesses, strict=True))
    attacks = [{"attack": row.attack, "norm": row.settings["norm"], "eps": row.settings["eps"]} for row in found]
    return Witnesses(**dict(zip(TENSORS, joined, strict=True)), about={**about, "attacks": attacks})


def load_witnesses(report: str | Path) -> tuple[Witnesses, list[bool]]:
    """Read the witnesses of a saved report, and tell for each whether it has changed since the report was saved."""
    path = Path(report) / "report.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("witnesses")
    if named is None:
        raise ValueError(f'{path} has no witnesses: no image fell, or keep="all" (--keep all) was not set')
    witnesses = Witnesses.load(path.parent)
    each, same = witnesses.summary()["each"], named["attacks"] == witnesses.about["attacks"]
    return witnesses, [one != other or not same for one, other in zip(each, named["each"], strict=True)]


#: The largest number of images that a text names.
NAMED = 10


@dataclass(frozen=True)
class CheckedWitnesses:
    """The result of a check of a report's witnesses.

    Args:
        witnesses: the report's witnesses.
        changed: bool ``[W]``, True for witnesses whose images, label, index or attack differ from the report.
        draws: number of predictions that judged each witness.
        wrong: number of wrong predictions on each witness, int64 ``[W]``.
        model: a sentence on whether the model is the report's model.
        same_model: whether the model is the report's model; None if they cannot be compared.
    """

    witnesses: Witnesses = field(repr=False)
    changed: np.ndarray
    draws: int
    wrong: np.ndarray
    model: str
    same_model: bool | None

    @property
    def falls(self) -> np.ndarray:
        """Tell which witnesses the model still misclassifies, by the rule of the report, bool ``[W]``."""
        return self.wrong > 0

    @property
    def outside(self) -> np.ndarray:
        """Tell which witnesses are outside the ball or [0, 1] by more than rounding, bool ``[W]``."""
        return self.witnesses.outside().numpy()

    @property
    def confirmed(self) -> bool:
        """Tell whether all witnesses are still misclassified, unchanged and within the ball."""
        return bool((self.falls & ~self.outside & ~self.changed).all())

    def to_text(self) -> str:
        """The result as text for a terminal."""
        faults = {
            "no longer falls": ~self.falls,
            "outside of the ball or of [0, 1]": self.outside,
            "changed since the report was saved": self.changed,
        }
        places = {what: np.flatnonzero(which).tolist() for what, which in faults.items()}
        attacks = self.witnesses.about["attacks"]
        balls = ", ".join(dict.fromkeys(ball_name(each["norm"], each["eps"]) for each in attacks))
        values = {"kept": self.witnesses, "attacks": attacks, "balls": balls, "places": places, "named": NAMED}
        return render("witnesses.txt.jinja", checked=self, **values).strip()


@whole_float32_by_default()
@torch.inference_mode(False)
def check_witnesses(
    report: str | Path, model: Classifier, *, batch_size: int = 250, seed: int | None = None
) -> CheckedWitnesses:
    """Test all witnesses of a saved report again.

    Args:
        report: the folder of a report that was made with ``keep="all"``.
        model: the model of the report, or another model; it computes on its own device.
        batch_size: the largest number of images in a forward pass.
        seed: seed of a random model's draws, which the report's rule judges. None: another seed than the report's.

    Returns:
        A `CheckedWitnesses`.

    Raises:
        FileNotFoundError: there is no report, or no file with witnesses.
        ValueError: the file is damaged, the report has no witnesses, or the model does not accept the images.
    """
    check_counts(batch_size=batch_size)
    witnesses, changed = load_witnesses(report)
    about = witnesses.about
    seed = about["seed"] + 1 if seed is None else seed
    Range(0).check("seed", seed)
    predict: Predict | None = about["predict"]
    with torch.random.fork_rng(), torch.no_grad(), frozen(model):
        options: dict[str, Any] = {"batch_size": batch_size, "n_eval": about["n_eval"], "seed": seed}
        subject = Subject(model, witnesses.adversarial, witnesses.labels, **options)
        if predict is not None and subject.is_random:
            subject = Subject(model, witnesses.adversarial, witnesses.labels, predict=predict, **options)
        judged = subject.judge(witnesses.adversarial, "random", "judge")
        sentence, same = _compared(about["model"], model_marks(subject.base_model, fingerprint(subject.model)))
    return CheckedWitnesses(
        witnesses, np.array(changed), len(judged.right), (~judged.right).sum(0), model=sentence, same_model=same
    )


def _compared(report: Mapping[str, str | None], now: Mapping[str, str | None]) -> tuple[str, bool | None]:
    """Tell whether a model is the report's model, in a sentence and as a bool."""
    if report["weights"] is None or now["weights"] is None:
        return "the model cannot be compared with the report's model, because a function has no weights", None
    if report["weights"] != now["weights"]:
        return f"the model has other weights ({now['weights']}) than the report's model ({report['weights']})", False
    if None in (report["fingerprint"], now["fingerprint"]):
        return "the model has the weights of the report's model; nothing else can be compared", None
    if report["fingerprint"] == now["fingerprint"]:
        return "the model is the report's model", True
    return "the model has the weights of the report's model, but other settings or other code", False
