"""A study of CARSO on MNIST at L-inf eps 0.3, under attacks with exact gradients.

The table has four columns. The first is an adversarially trained classifier. The second and the third are CARSO with
the paper's objective, attacked through PeeL, which is the output that its authors attack, and through exact gradients.
The fourth is CARSO that was fine-tuned through the whole pipeline.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from purify_fast import load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import APGD, PGD, AutoAttack
from purify_fast.demo.setting import LAYERS
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job
from .report_study import EPS, MakeJob, ReportStudy, images_of, train, train_classifier

#: The sizes of CARSO. The number of samples, K = 4, is that of the paper's first version on MNIST.
SIZES = {"cond_dim": 64, "latent_dim": 16, "samples": 4, "decoder_width": 8}
CLASSIFIER, EXACT, PIPELINE = "classifier", "CARSO, paper's objective", "CARSO pipeline"
#: The column of the model `EXACT` under attacks through PeeL, the output that CARSO's authors attack.
PEEL = f"{EXACT}, through PeeL"


def apgd_without_noise(name: str, steps: int, classifier: str, where: str = "", **options: object) -> list[AttackSpec]:
    """Return two attacks: APGD with cross-entropy, and then targeted APGD.

    They attack CARSO with the latent z = 0, in place of a random latent. A classifier without CARSO has no latent.
    """
    variant = "random" if name == classifier else "deterministic"
    return [
        AttackSpec(
            APGD(loss=loss, steps=steps),
            variant=variant,
            survivors_only=loss != "ce",
            label=f"{label}, z = 0{where}",
            **options,
        )
        for loss, label in (("ce", "APGD ce"), ("dlr_targeted", "APGD ce + APGD-T"))
    ]


def pgd_with_draws(budget: SimpleNamespace, **options: object) -> list[AttackSpec]:
    """Return PGD with cross-entropy, and PGD with DLR on the survivors. Each step averages over random predictions."""
    return [
        AttackSpec(
            PGD(loss=loss), survivors_only=loss != "ce", label=f"PGD-{budget.steps} {what}, EOT {budget.eot}", **options
        )
        for loss, what in (("ce", "ce"), ("dlr", "ce + dlr"))
    ]


def train_carso(job: Job, folder: Path, root: Path) -> dict:
    """Train CARSO with the paper's objective, or continue this training through the pipeline."""
    budget, images = job.settings["budget"], images_of(job)
    if job.name == EXACT:
        torch.manual_seed(job.seed)
        defence = Carso(load_classifier(job.folder(root, CLASSIFIER)), LAYERS, images.image_shape, **SIZES)
        task = CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=40)))
        epochs = budget.objective_epochs
    else:
        defence = load_defence(job.folder(root, EXACT), load_classifier(job.folder(root, CLASSIFIER)))
        config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=7))
        task, epochs = CarsoTask(defence, config, weights_fingerprint(defence)), budget.pipeline_epochs
    last = train(job, folder, task, images, epochs)
    defence.save(folder)
    return last


class CarsoMnist(ReportStudy):
    """The study of CARSO on MNIST, attacked as its authors do and with exact gradients."""

    name = "carso_mnist"
    samples = SIZES["samples"]
    models: ClassVar[dict[str, str | None]] = {CLASSIFIER: CLASSIFIER, PEEL: EXACT, EXACT: EXACT, PIPELINE: PIPELINE}

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [
            job(CLASSIFIER, train_classifier, epochs=budget.base_epochs),
            job(EXACT, train_carso, CLASSIFIER),
            job(PIPELINE, train_carso, CLASSIFIER, EXACT),
        ]

    def model(self, job: Job, root: Path, name: str) -> nn.Module:
        base = load_classifier(job.folder(root, CLASSIFIER))
        return base if name == CLASSIFIER else load_defence(job.folder(root, self.models[name]), base)

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        b, head = budget, {"aggregation": "peel_reference" if name == PEEL else None}
        # AutoAttack's version "rand" is only for random models. The classifier is deterministic.
        version = "standard" if name == CLASSIFIER else "rand"
        auto = AutoAttack(version=version, steps=b.apgd_steps, eot_iter=b.autoattack_eot, n_queries=b.queries)
        label = f"AutoAttack rand (classifier: standard), first {b.autoattack}"
        return {
            "PGD": pgd_with_draws(b, **head),
            "APGD": apgd_without_noise(name, b.apgd_steps, CLASSIFIER, **head),
            "AutoAttack": [AttackSpec(auto, max_images=b.autoattack, label=label, **head)],
        }
