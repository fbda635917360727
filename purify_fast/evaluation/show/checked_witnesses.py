"""Tests the witnesses of a saved report again, and shows the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...attacks import frozen
from ...attacks.arguments import check_at_least_one, check_not_negative
from ...model_state import fingerprint
from ...protocols import Classifier
from ...speed.precision import whole_float32_by_default
from ..asked.config import Predict
from ..asked.inputs import as_classifier
from ..asked.naming import ball_name
from ..asked.subject import Subject
from ..results.witnesses import load_witnesses, model_marks
from .text import render

#: The largest number of images that a text names.
NAMED = 10


@dataclass(frozen=True)
class CheckedWitnesses:
    """The result of a check of a report's witnesses.

    Args:
        numbers: the index of each image in the evaluated data.
        attacks: the name of the attack that found each witness.
        falls: bool ``[W]``, True for witnesses that the model still misclassifies, by the rule of the report.
        draws: number of predictions that judged each witness.
        wrong: number of wrong predictions on each witness, int64 ``[W]``.
        outside: bool ``[W]``, True for witnesses that are outside the ball or [0, 1] by more than rounding.
        changed: bool ``[W]``, True for witnesses whose image, clean image, label, index or attack differs from the
            report.
        margins: the true logit minus the largest other logit in the report's evaluation, float32 ``[W]``.
        balls: the balls of the attacks, in words.
        model: a sentence on whether the model is the report's model.
        same_model: whether the model is the report's model; None if they cannot be compared.
    """

    numbers: np.ndarray
    attacks: list[str]
    falls: np.ndarray
    draws: int
    wrong: np.ndarray
    outside: np.ndarray
    changed: np.ndarray
    margins: np.ndarray = field(repr=False)
    balls: str
    model: str = ""
    same_model: bool | None = None

    @property
    def confirmed(self) -> bool:
        """Tell whether all witnesses are still misclassified, unchanged and within the ball."""
        return bool((self.falls & ~self.outside & ~self.changed).all())

    def to_text(self) -> str:
        """The result as text for a terminal."""
        told = {
            "no longer falls": ~self.falls,
            "outside of the ball or of [0, 1]": self.outside,
            "changed since the report was saved": self.changed,
        }
        places = {what: np.flatnonzero(which).tolist() for what, which in told.items()}
        return render("witnesses.txt.jinja", checked=self, places=places, named=NAMED).strip()


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
        seed: seed of a random model's draws. None: another seed than the report's, so that the draws are fresh. The
            draws are judged by the report's rule.

    Returns:
        A `CheckedWitnesses`.

    Raises:
        FileNotFoundError: there is no report, or no file with witnesses.
        ValueError: the file is damaged, the report has no witnesses, or the model does not accept the images.
        TypeError: model is not callable.
    """
    check_at_least_one(batch_size=batch_size)
    witnesses, changed = load_witnesses(report)
    about = witnesses.about
    seed = about["seed"] + 1 if seed is None else seed
    check_not_negative(seed=seed)
    model = as_classifier(model)
    predict: Predict | None = about["predict"]
    with torch.random.fork_rng(), torch.no_grad(), frozen(model):
        options: dict[str, Any] = {"batch_size": batch_size, "n_eval": about["n_eval"], "seed": seed}
        subject = Subject(model, witnesses.adversarial, witnesses.labels, **options)
        if predict is not None and subject.is_random:
            subject = Subject(model, witnesses.adversarial, witnesses.labels, predict=predict, **options)
        judged = subject.judge(witnesses.adversarial, "random", "judge")
        sentence, same = _compared(about["model"], model_marks(subject.base_model, fingerprint(subject.model)))
    return CheckedWitnesses(
        numbers=witnesses.numbers.numpy(),
        attacks=[about["attacks"][number]["attack"] for number in witnesses.attacks.tolist()],
        falls=np.asarray(~judged.right.all(0)),
        draws=len(judged.right),
        wrong=(~judged.right).sum(0),
        outside=witnesses.outside().numpy(),
        changed=np.array(changed),
        margins=witnesses.margins.numpy(),
        balls=", ".join(dict.fromkeys(ball_name(each["norm"], each["eps"]) for each in about["attacks"])),
        model=sentence,
        same_model=same,
    )


def _compared(report: Mapping[str, str | None], now: Mapping[str, str | None]) -> tuple[str, bool | None]:
    """Tell whether a model is the report's model, in a sentence and as a bool."""
    if report["weights"] is None or now["weights"] is None:
        return "the model cannot be compared with the report's model, because a function has no weights", None
    if report["weights"] != now["weights"]:
        return f"the model has other weights ({now['weights']}) than the report's model ({report['weights']})", False
    if None in (report["fingerprint"], now["fingerprint"]):
        return "the model has the weights of the report's model; nothing else can be compared", None
    same = report["fingerprint"] == now["fingerprint"]
    other = "has the weights of the report's model, but other settings, other code or another version of PyTorch"
    return "the model is the report's model" if same else f"the model {other}", same
