"""AToP on MNIST, L-inf eps 0.3: its accuracy under attacks through the whole defence, for several trainings.

On a classifier trained on clean images, the purifier is only pre-trained, fine-tuned with the paper's objective (FGSM
on the classifier), or fine-tuned through the whole pipeline; on an adversarially trained classifier only the last. Each
is attacked with full gradients and, for comparison, as in the paper's ablation: on the classifier alone.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.training import FitConfig, TrainingAttack, fit, load_classifier

from . import Job
from .report_study import EPS, MakeJob, ReportStudy, images_of, train_classifier

STANDARD, ROBUST = "standard classifier", "PGD-AT classifier"
PRETRAINED, OBJECTIVE, PIPELINE = "AToP pre-trained only", "AToP, paper's objective", "AToP pipeline"
ROBUST_PIPELINE = "AToP pipeline on PGD-AT"
#: The classifier behind each model, by row.
BASES = dict.fromkeys((STANDARD, PRETRAINED, OBJECTIVE, PIPELINE), STANDARD)
BASES |= dict.fromkeys((ROBUST, ROBUST_PIPELINE), ROBUST)


def train_stage(job: Job, folder: Path, defence: Atop, images: data.DataSet, stage: dict, eps: float) -> dict:
    """Train and save the defence's purifier; return the last epoch's metrics.

    ``stage`` has ``epochs``, ``batch_size`` and, unless all images are used, ``images``, the number of first images. A
    stage of ``pretraining`` has no attack, any other stage has its ``steps``. The other names are `AtopConfig`'s.
    """
    options = dict(stage)
    fitting = FitConfig(options.pop("epochs"), options.pop("batch_size"), job.seed)
    n = options.pop("images", len(images.x_train))
    if options.pop("pretraining", False):
        config = AtopConfig.pretraining(**options)
    else:
        config = AtopConfig(attack=TrainingAttack(eps=eps, steps=options.pop("steps", 10)), **options)
    task = AtopTask(defence, config, weights_fingerprint(defence))
    last = fit(task, images.x_train[:n], images.y_train[:n], fitting, folder)
    defence.save(folder)
    return last


def train_purifier(job: Job, folder: Path, root: Path) -> dict:
    """Train on clean images, with L1 and a discriminator, or go on with the paper's objective or the pipeline.

    In pre-training the classifier takes no part.
    """
    budget, images = job.settings["budget"], images_of(job)
    place = job.folder(root, BASES[job.name])
    if job.name == PRETRAINED:
        torch.manual_seed(job.seed)
        generator = SmallGenerator(1, **budget.generator)
        defence = Atop(load_classifier(place), generator, images.image_shape, **budget.defence)
    else:
        # Leave out the check for the same classifier, since pre-training used none.
        defence = load_defence(job.folder(root, PRETRAINED), load_classifier(place), check=False)
    return train_stage(job, folder, defence, images, getattr(budget, job.settings["stage"]), EPS)


class AtopMnist(ReportStudy):
    """AToP on MNIST: which training helps against attacks through the whole defence."""

    name = "atop_mnist"
    models: ClassVar[dict[str, str | None]] = {name: name for name in BASES}
    uses_autoattack = False
    sizes: ClassVar[dict[str, int]] = {"batch_size": 250, "max_forward_batch": 250}

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        return [
            job(STANDARD, train_classifier, epochs=budget.standard_epochs, eps=0.0),
            job(ROBUST, train_classifier, epochs=budget.robust_epochs),
            job(PRETRAINED, train_purifier, STANDARD, stage="pretraining"),
            job(PIPELINE, train_purifier, STANDARD, PRETRAINED, stage="pipeline"),
            job(ROBUST_PIPELINE, train_purifier, ROBUST, PRETRAINED, stage="pipeline"),
            job(OBJECTIVE, train_purifier, STANDARD, PRETRAINED, stage="objective"),
        ]

    def model(self, job: Job, root: Path, name: str) -> nn.Module:
        classifier = load_classifier(job.folder(root, BASES[name]))
        return classifier if name == BASES[name] else load_defence(job.folder(root, name), classifier)

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        first, steps, eot = budget.first_steps, budget.steps, budget.eot
        attacks = [
            AttackSpec(PGD(loss="ce", steps=first, eot_iter=1), label=f"PGD-{first} ce, EOT 1"),
            AttackSpec(PGD(loss="ce"), survivors_only=True, label=f"then PGD-{steps} ce, EOT {eot}"),
            AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"then PGD-{steps} dlr, EOT {eot}"),
        ]
        if name != BASES[name]:
            attacks.append(AttackSpec(PGD(loss="ce"), target="classifier", label=f"weak protocol: PGD-{steps} ce"))
        return {"attacked": attacks}
