"""A study of AToP's robustness on digits, with one change at a time, over several seeds.

In the row "pipeline" a purifier was fine-tuned through the whole defence, on an adversarially trained classifier. This
purifier adds a correction to the image. Before the training the correction is zero. The names of the other rows say
what they change. All rows are compared with the classifier without a defence.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from purify_fast import load_defence
from purify_fast.attacks import PGD
from purify_fast.demo import setting
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop, SmallGenerator
from purify_fast.training import load_classifier

from . import Job, Work
from .atop_mnist import train_stage
from .digits import EPS, DigitsStudy, attacked, count, effort, train_base, with_samples, zero_attacks


def _attacked(model: nn.Module, job: Job) -> dict:
    """Attack a model with its randomness, and then without it, in two evaluations.

    In a single evaluation, the second group of attacks on a deterministic model would skip the images that the first
    group broke.
    """
    quick, auto = job.settings["quick"], job.settings["autoattack"]
    amount = effort(quick)
    first, steps, eot = amount.first_steps, amount.steps, amount.eot
    labels = [f"PGD-{first} ce, one draw", f"PGD-{steps} ce, EOT {eot}", f"PGD-{steps} dlr, EOT {eot}"]
    attacks = [
        AttackSpec(PGD(loss="ce", steps=first, eot_iter=1), label=labels[0]),
        AttackSpec(PGD(loss="ce", eot_iter=eot), survivors_only=True, label=labels[1]),
        AttackSpec(PGD(loss="dlr", eot_iter=eot), survivors_only=True, label=labels[2]),
    ]
    zero, rows = zero_attacks(model.sigma > 0 or model.missing > 0, quick, auto)
    keys = {key if key == "autoattack" else f"{key}_zero": label for key, label in rows.items()}
    parts = [
        attacked(model, job.seed, attacks, {"clean": "clean", "pgd": labels[2]}, quick),
        attacked(model, job.seed, zero, keys, quick),
    ]
    healthy = all(part["gradients"] == "healthy" for part in parts)
    return parts[0] | parts[1] | {"gradients": "healthy" if healthy else "BAD"}


def train(job: Job, folder: Path, root: Path) -> dict:
    """Train the purifier of a row. It is new, or starts from the purifier of another row."""
    s, digits = job.settings, setting.digits()
    base = load_classifier(job.folder(root, s["base"]))
    torch.manual_seed(job.seed)
    if "start" in s:
        # Do not require the same classifier, because the training of the other row did not use its classifier.
        purifier = load_defence(job.folder(root, s["start"]), base, check=False).purifier.module
    else:
        purifier = SmallGenerator(1, **s["generator"])
    defence = Atop(base, purifier, digits.image_shape, **s["defence"])
    # A quick run has three epochs, because the paper's cross-entropy takes part only after two epochs.
    stage = s["stage"] | ({"epochs": 3, "images": 128} if s["quick"] else {})
    train_stage(job, folder, defence, digits, stage, EPS)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """Attack the trained defence of another row, with another number of samples (purified images) per prediction."""
    return _attacked(with_samples(job, root), job)


class AtopDigits(DigitsStudy):
    """The study of AToP's robustness on digits."""

    name = "atop_digits"
    works: ClassVar[dict[str, Work]] = {"classifier": train_base, "purifier": train, "samples": attack_samples}
