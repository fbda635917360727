"""The adversarial images of a report, in a file that anybody can give to a model again."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._files import atomic
from ..._hashes import digest, text_hash
from ..._validation import Range, check_counts
from ...attacks import frozen
from ...protocols import Classifier
from ...speed.precision import whole_float32_by_default
from ..request.deadline import Subject

FILE = "adversarial.npz"
ARRAYS = ("images", "labels", "indices", "attacks")
#: The largest number of images that a text names.
NAMED = 10


@dataclass(frozen=True)
class Adversarial:
    """The worst attacked image of each image that fell, within each threat model.

    Args:
        images: the attacked images, exactly as the model got them, float32 ``[W, C, H, W]``.
        labels: the true classes, int64 ``[W]``.
        indices: the indices of the images in the data, int64 ``[W]``.
        attacks: the label of the row whose attack made each image, texts ``[W]``.
        about: how the report judged: ``random``, ``n_eval``, ``predict``, ``seed`` and ``precision``.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    attacks: np.ndarray
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def facts(self) -> dict[str, Any]:
        """The facts that ``report.json`` stores: ``about``, and a hash of all images."""
        arrays = (torch.from_numpy(each) for each in (self.images, self.labels, self.indices))
        return {
            "hash": text_hash(json.dumps([digest(*arrays), self.attacks.tolist()])).hexdigest(),
            "about": self.about,
        }

    def save(self, folder: Path) -> None:
        """Write ``adversarial.npz`` atomically."""
        with atomic(folder / FILE) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in ARRAYS})

    @classmethod
    def load(cls, folder: Path) -> Adversarial:
        """Read the file beside a report. Raises a ValueError if it is damaged or belongs to another report."""
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8")).get("adversarial")
        if facts is None:
            raise ValueError(f"{folder / 'report.json'} has no adversarial images")
        if facts["about"]["predict"] == "votes":
            raise ValueError(f"{folder} was judged by a vote, by an earlier version: evaluate a MajorityVote again")
        try:
            with np.load(folder / FILE) as arrays:
                found = cls(**{name: arrays[name] for name in ARRAYS}, about=facts["about"])
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{folder / FILE} is damaged, or another program wrote it: {error}") from error
        if found.facts() != facts:
            raise ValueError(f"{folder / FILE} has changed since the report was saved, or belongs to another report")
        return found


def gathered(found: Sequence[tuple[int, str, np.ndarray]], x: Tensor, y: Tensor, about: dict[str, Any]) -> Adversarial:
    """Gather attacked images, each with its index in the data and the attack's label."""
    indices = np.array([index for index, _, _ in found], dtype=np.int64)
    images = np.stack([image for _, _, image in found]) if found else x[:0].cpu().numpy()
    return Adversarial(images, y.cpu().numpy()[indices], indices, np.array([name for _, name, _ in found], str), about)


@dataclass(frozen=True)
class CheckedAdversarial:
    """New predictions on the adversarial images of a report.

    Args:
        adversarial: the images.
        fooled: True for the images that the model still misclassifies, by the rule of the report, bool ``[W]``.
    """

    adversarial: Adversarial = field(repr=False)
    fooled: np.ndarray

    @property
    def fits(self) -> bool:
        """Return True if the model may be that of the report.

        Every image must fool it. If the model of the report is random, more than half of the images must, because its
        draws differ from those of the report.
        """
        enough = len(self.fooled) // 2 + 1 if self.adversarial.about["random"] else len(self.fooled)
        return bool(self.fooled.sum() >= min(enough, len(self.fooled)))

    def to_text(self) -> str:
        """The result as text for a terminal."""
        verdict = "which fits the report" if self.fits else "which does not fit the report"
        withstood, known = np.flatnonzero(~self.fooled), self.adversarial
        lines = [f"{self.fooled.sum()} of {len(known)} adversarial images still fool the model, {verdict}"]
        lines += [f"  classified correctly: image {known.indices[i]} ({known.attacks[i]})" for i in withstood[:NAMED]]
        return "\n".join([*lines, *([f"  and {len(withstood) - NAMED} more"] if len(withstood) > NAMED else [])])


@whole_float32_by_default()
@torch.inference_mode(False)
def check_adversarial(
    folder: str | Path, model: Classifier, *, batch_size: int = 250, seed: int | None = None
) -> CheckedAdversarial:
    """Give the adversarial images of a saved report to a model again.

    Args:
        folder: the folder of the report.
        model: the model of the report, or another model; it computes on its own device.
        batch_size: the largest number of images in a forward pass.
        seed: seed of a random model's draws. None: another seed than the report's.

    Returns:
        A `CheckedAdversarial`.

    Raises:
        FileNotFoundError: there is no report, or no file with adversarial images.
        ValueError: the file is damaged, it has no image, it belongs to another report, or the model does not accept the
            images.
    """
    check_counts(batch_size=batch_size)
    found = Adversarial.load(Path(folder))
    about, images, labels = found.about, torch.from_numpy(found.images), torch.from_numpy(found.labels)
    seed = about["seed"] + 1 if seed is None else seed
    Range(0).check("seed", seed)
    if len(found) == 0:
        raise ValueError(f"{folder} holds no adversarial image: no attack fooled the model, so nothing can be checked")
    with torch.random.fork_rng(), torch.no_grad(), frozen(model):
        how: dict[str, Any] = {"batch_size": batch_size, "n_eval": about["n_eval"], "seed": seed}
        judged = Subject(model, images, labels, **how).judge(images, "judge")
    return CheckedAdversarial(found, judged.wrong > 0)
