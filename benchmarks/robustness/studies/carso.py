"""The studies of CARSO on MNIST and on digits.

**On MNIST** the radius is eps = 0.3. The table has four columns:

1. an adversarially trained classifier;
2. CARSO with the paper's objective, attacked through PeeL, which is the output that CARSO's authors attack;
3. the same CARSO, attacked with exact gradients;
4. CARSO that was fine-tuned through the whole pipeline.

**On digits** the study makes a single change at a time, over three seeds. Every model is attacked without its
randomness (z = 0, no noise), by PGD-100 with cross-entropy, then by PGD-100 with DLR, and then by AutoAttack.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from examples.demo import setting
from purify_fast import data, load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import APGD, PGD, AutoAttack
from purify_fast.defences import NoisyEnsemble, WithAggregation
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import BankConfig, FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, Work
from .digits import DigitsStudy, attacked, ball_of, count, effort, train_base, with_samples, zero_attacks
from .report_study import EPS, MakeJob, ReportStudy, images_of, train_classifier

CLASSIFIER, EXACT, PIPELINE = "classifier", "CARSO, paper's objective", "CARSO pipeline"
#: The column of the model `EXACT` under attacks through PeeL, the output that CARSO's authors attack.
PEEL = f"{EXACT}, through PeeL"
#: The label of an attack in the study on digits.
DRAWS = "PGD ce, EOT 4, K draws"


def train_stage(job: Job, folder: Path, defence: Carso, images: data.DataSet, stage: dict, start: bool) -> dict:
    """Train and save a defence, and return the metrics of the last epoch.

    Args:
        job: job with the seed.
        folder: folder of the saved defence.
        defence: defence whose purifier is trained.
        images: data set with the training images.
        stage: settings of the training: ``epochs``, ``batch_size``, ``eps``, ``norm`` and ``steps`` of the attack, and
            options of `CarsoConfig`. ``images`` is the number of the first images that are used; the default is all.
            ``bank`` has the options of a bank of adversarial images; the default is no bank.
        start: True if the weights of the purifier are new.
    """
    options = dict(stage)
    fitting = FitConfig(options.pop("epochs"), options.pop("batch_size"), job.seed)
    n = options.pop("images", len(images.x_train))
    bank = BankConfig(folder=folder, **options.pop("bank")) if "bank" in options else None
    attack = TrainingAttack(eps=options.pop("eps"), norm=options.pop("norm", "linf"), steps=options.pop("steps"))
    origin = "scratch" if start else weights_fingerprint(defence)
    task = CarsoTask(defence, CarsoConfig(attack=attack, **options), origin)
    last = fit(task, images.x_train[:n], images.y_train[:n], fitting, folder, bank=bank)
    defence.save(folder)
    return last


class CarsoMnist(ReportStudy):
    """The study of CARSO on MNIST, attacked as its authors do and with exact gradients."""

    name = "carso_mnist"
    models: ClassVar[dict[str, str]] = {CLASSIFIER: CLASSIFIER, PEEL: EXACT, EXACT: EXACT, PIPELINE: PIPELINE}
    bases: ClassVar[dict[str, str]] = dict.fromkeys(models, CLASSIFIER)

    def train(self, job: Job, folder: Path, root: Path) -> dict:
        """Train a purifier with the paper's objective, or continue its training through the pipeline."""
        budget, images, start = job.settings["budget"], images_of(job), job.name == EXACT
        torch.manual_seed(job.seed)
        classifier = load_classifier(job.folder(root, CLASSIFIER))
        if start:
            defence = Carso(classifier, setting.LAYERS, images.image_shape, **budget.defence)
        else:
            defence = load_defence(job.folder(root, EXACT), classifier)
        stage = getattr(budget, job.settings["stage"]) | {"eps": EPS}
        return train_stage(job, folder, defence, images, stage, start)

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [
            job(CLASSIFIER, train_classifier, epochs=budget.base_epochs),
            job(EXACT, self.train, CLASSIFIER, stage="objective"),
            job(PIPELINE, self.train, CLASSIFIER, EXACT, stage="pipeline"),
        ]

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        b, head = budget, {"aggregation": "peel_reference" if name == PEEL else None}
        # AutoAttack's version "rand" is only for random models. The classifier is deterministic.
        version = "standard" if name == CLASSIFIER else "rand"
        auto = AutoAttack(version=version, steps=b.apgd_steps, eot_iter=b.autoattack_eot, n_queries=b.queries)
        label = f"AutoAttack rand (classifier: standard), first {b.autoattack}"
        # Attack CARSO by APGD with the latent z = 0 in place of a random latent.
        zero = {"variant": "random" if name == CLASSIFIER else "deterministic"} | head
        return {
            "PGD": [
                AttackSpec(PGD(loss="ce"), label=f"PGD-{b.steps} ce, EOT {b.eot}", **head),
                AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"PGD-{b.steps} ce + dlr, EOT {b.eot}", **head),
            ],
            "APGD": [
                AttackSpec(APGD(loss="ce", steps=b.apgd_steps), label="APGD ce, z = 0", **zero),
                AttackSpec(
                    APGD(loss="dlr_targeted", steps=b.apgd_steps),
                    survivors_only=True,
                    label="APGD ce + APGD-T, z = 0",
                    **zero,
                ),
            ],
            "AutoAttack": [AttackSpec(auto, max_images=b.autoattack, label=label, **head)],
        }


def _attacked(model: nn.Module, job: Job) -> dict:
    """Attack a model of the study on digits."""
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
    return attacked(model, job, attacks, rows)


def train_on_digits(job: Job, folder: Path, root: Path) -> dict:
    """Train a new purifier with the paper's objective, or finetune the purifier of another row through the pipeline.

    The setting ``start`` is the name of this other row.
    """
    s, images, start = job.settings, setting.digits(), "start" not in job.settings
    base = load_classifier(job.folder(root, s["base"]))
    if start:
        torch.manual_seed(job.seed)
        defence = Carso(base, s.get("layers", setting.LAYERS), images.image_shape, **setting.SIZES)
        stage = {"batch_size": 64, "steps": 20}
    else:
        defence = load_defence(job.folder(root, s["start"]), base)
        stage = {"batch_size": 128, "steps": 7, "attack_target": "pipeline", "learning_rate": 4e-3}
    # With fewer than three epochs, the KL term of the paper's objective would never take part.
    epochs = (3 if start else 1) if s["quick"] else s["epochs"]
    stage |= {"epochs": epochs, **ball_of(job), **s.get("attack", {}), **s.get("config", {})}
    stage |= {"bank": s["bank"]} if "bank" in s else {}
    last = train_stage(job, folder, defence, images, stage, start)
    result = _attacked(defence, job) | {"parameters": count(defence)}
    return result | {"kl": last["kl"]} if start else result


def attack_copies(job: Job, folder: Path, root: Path) -> dict:
    """Attack a classifier that averages over noisy copies of the image, with noise of size ``sigma`` (a setting)."""
    s = job.settings
    defence = NoisyEnsemble(load_classifier(job.folder(root, s["base"])), s["sigma"], 8)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """Attack the trained defence of another row, with another number K of samples, which is the setting ``samples``."""
    return _attacked(with_samples(job, root), job)


class CarsoDigits(DigitsStudy):
    """The study of CARSO's robustness on digits."""

    name = "carso_digits"
    works: ClassVar[dict[str, Work]] = {
        "classifier": train_base,
        "purifier": train_on_digits,
        "copies": attack_copies,
        "samples": attack_samples,
    }
