"""A study of CARSO's robustness on digits, with one change at a time, over three seeds.

Every model is attacked in the same way. The deterministic model (z = 0, no noise) is attacked by PGD-100 with
cross-entropy, then with DLR, and by AutoAttack on the images that remain. The main models are also attacked with their
randomness, by PGD with expectation over draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from purify_fast import load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import PGD
from purify_fast.defences import NoisyEnsemble, WithAggregation
from purify_fast.demo import setting
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, Work
from .digits import EPS, DigitsStudy, attacked, count, effort, train_base, with_samples, zero_attacks

DRAWS = "PGD ce, EOT 4, K draws"


def _attacked(model: nn.Module, job: Job) -> dict:
    s = job.settings
    attacks, rows = zero_attacks(True, s["quick"])
    if s.get("draws"):
        zero = WithAggregation(model, deterministic=True)
        attacks += [
            AttackSpec(PGD(loss="ce"), target=zero, label="made at z = 0"),
            AttackSpec(
                PGD(loss="ce", steps=effort(s["quick"]).draw_steps, eot_iter=4), survivors_only=True, label=DRAWS
            ),
        ]
        rows |= {"clean_draws": "clean", "pgd_draws": DRAWS}
    return attacked(model, job.seed, attacks, rows, s["quick"], eps=s.get("eps", EPS), norm=s.get("norm", "linf"))


def train(job: Job, folder: Path, root: Path) -> dict:
    """Train a purifier with the paper's objective, or train the purifier of another row through the pipeline.

    The job's settings are ``base`` and ``epochs`` and, optionally, ``start``, ``layers``, ``config``, ``attack``,
    ``eps`` and ``norm``.
    """
    s, digits = job.settings, setting.digits()
    base = load_classifier(job.folder(root, s["base"]))
    ball = {"eps": s.get("eps", EPS), "norm": s.get("norm", "linf")}
    if "start" in s:
        defence, batch_size = load_defence(job.folder(root, s["start"]), base), 128
        origin, quick_epochs = weights_fingerprint(defence), 1
        attack = TrainingAttack(**{"steps": 7, **ball, **s.get("attack", {})})
        options = {"attack_target": "pipeline", "learning_rate": 4e-3, **s.get("config", {})}
    else:
        torch.manual_seed(job.seed)
        defence, batch_size = Carso(base, s.get("layers", setting.LAYERS), digits.image_shape, **setting.SIZES), 64
        # A quick run has three epochs, because with fewer epochs the KL term would never take part.
        origin, quick_epochs = "scratch", 3
        attack, options = TrainingAttack(steps=20, **ball), s.get("config", {})
    task = CarsoTask(defence, CarsoConfig(attack=attack, **options), origin)
    fitting = FitConfig(quick_epochs if s["quick"] else s["epochs"], batch_size, job.seed)
    last = fit(task, digits.x_train, digits.y_train, fitting, folder)
    defence.save(folder)
    result = _attacked(defence, job) | {"parameters": count(defence)}
    return result if "start" in s else result | {"kl": last["kl"]}


def attack_copies(job: Job, folder: Path, root: Path) -> dict:
    """Attack a classifier that averages over noisy copies of the image. The setting ``sigma`` is their noise."""
    s = job.settings
    defence = NoisyEnsemble(load_classifier(job.folder(root, s["base"])), s["sigma"], 8)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """Attack a trained model with another number K of samples in a prediction, which is the setting ``samples``."""
    return _attacked(with_samples(job, root), job)


class CarsoDigits(DigitsStudy):
    """The study of CARSO's robustness on digits."""

    name = "carso_digits"
    works: ClassVar[dict[str, Work]] = {
        "classifier": train_base,
        "purifier": train,
        "copies": attack_copies,
        "samples": attack_samples,
    }
