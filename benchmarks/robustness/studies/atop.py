"""The studies of AToP on MNIST and on digits, under attacks through the whole defence, for several trainings.

**On MNIST** the radius is eps = 0.3. A classifier that was trained on clean images is combined with three purifiers.
The first is only pre-trained, the second is fine-tuned with the paper's objective (FGSM on the classifier), and the
third is fine-tuned through the whole pipeline. An adversarially trained classifier is combined with a purifier of the
third kind only. Each defence is attacked with gradients of the whole defence, and through the classifier
alone, as in the paper's ablation.

**On digits** the study makes a single change at a time, over several seeds. The row "pipeline" is the starting point: a
purifier that was fine-tuned through the whole defence, on an adversarially trained classifier. The name of another row
says how the row differs from "pipeline".
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
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.training import FitConfig, TrainingAttack, fit, load_classifier

from . import Job, Work, digits
from .digits import DigitsStudy, attacked, count, effort, train_base, with_samples, zero_attacks
from .report_study import EPS, MakeJob, ReportStudy, images_of, train_classifier

STANDARD, ROBUST = "standard classifier", "PGD-AT classifier"
PRETRAINED, OBJECTIVE, PIPELINE = "AToP pre-trained only", "AToP, paper's objective", "AToP pipeline"
ROBUST_PIPELINE = "AToP pipeline on PGD-AT"
#: The classifier of each model. For a classifier without a defence, this is the classifier itself.
BASES = dict.fromkeys((STANDARD, PRETRAINED, OBJECTIVE, PIPELINE), STANDARD)
BASES |= dict.fromkeys((ROBUST, ROBUST_PIPELINE), ROBUST)


def train_stage(job: Job, folder: Path, defence: Atop, images: data.DataSet, stage: dict, eps: float) -> dict:
    """Train and save the purifier of a defence, and return the metrics of the last epoch.

    Args:
        job: job with the seed.
        folder: folder of the saved defence.
        defence: defence whose purifier is trained.
        images: data set with the training images.
        stage: settings of the training: ``epochs``, ``batch_size``, and options of `AtopConfig`. ``images`` is the
            number of the first images that are used; the default is all images. ``pretraining`` is True for a training
            without an attack. Otherwise ``steps`` is the number of steps of the attack.
        eps: L-inf radius of the attack, in image units.
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
    """Pre-train the purifier without the classifier, or continue with the paper's objective or through the pipeline."""
    budget, images = job.settings["budget"], images_of(job)
    place = job.folder(root, BASES[job.name])
    if job.name == PRETRAINED:
        torch.manual_seed(job.seed)
        generator = SmallGenerator(1, **budget.generator)
        defence = Atop(load_classifier(place), generator, images.image_shape, **budget.defence)
    else:
        # Do not check that the defence was saved with this classifier, because the pre-training uses no classifier.
        defence = load_defence(job.folder(root, PRETRAINED), load_classifier(place), check=False)
    return train_stage(job, folder, defence, images, getattr(budget, job.settings["stage"]), EPS)


class AtopMnist(ReportStudy):
    """The study of AToP on MNIST, with several trainings, under attacks through the whole defence."""

    name = "atop_mnist"
    models: ClassVar[dict[str, str]] = {name: name for name in BASES}
    bases: ClassVar[dict[str, str]] = BASES
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


def _attacked(model: nn.Module, job: Job) -> dict:
    """Attack a model with its randomness, and then without it, in two evaluations.

    The evaluations are separate for the sake of deterministic models: in a single evaluation, the second group of
    attacks would skip the images that the first group broke.
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
    zero, rows = zero_attacks(model.sigma > 0 or model.mask_ratio > 0, quick, auto)
    keys = {key if key == "autoattack" else f"{key}_zero": label for key, label in rows.items()}
    parts = [
        attacked(model, job, attacks, {"clean": "clean", "pgd": labels[2]}),
        attacked(model, job, zero, keys),
    ]
    healthy = all(part["gradients"] == "healthy" for part in parts)
    return parts[0] | parts[1] | {"gradients": "healthy" if healthy else "BAD"}


def train_on_digits(job: Job, folder: Path, root: Path) -> dict:
    """Train the purifier of a row. The purifier starts with random weights, or with the weights of another row."""
    s, images = job.settings, setting.digits()
    base = load_classifier(job.folder(root, s["base"]))
    torch.manual_seed(job.seed)
    if "start" in s:
        # The other row's defence may have another classifier, because the training of a generator alone uses none.
        purifier = load_defence(job.folder(root, s["start"]), base, check=False).purifier.module
    else:
        purifier = SmallGenerator(1, **s["generator"])
    defence = Atop(base, purifier, images.image_shape, **s["defence"])
    # A quick run has three epochs, because the cross-entropy of the paper's objective takes part only after two epochs.
    stage = s["stage"] | ({"epochs": 3, "images": 128} if s["quick"] else {})
    train_stage(job, folder, defence, images, stage, digits.EPS)
    return _attacked(defence, job) | {"parameters": count(defence)}


def attack_samples(job: Job, folder: Path, root: Path) -> dict:
    """Attack the trained defence of another row, with another number of samples (purified images) per prediction."""
    return _attacked(with_samples(job, root), job)


class AtopDigits(DigitsStudy):
    """The study of AToP's robustness on digits."""

    name = "atop_digits"
    works: ClassVar[dict[str, Work]] = {
        "classifier": train_base,
        "purifier": train_on_digits,
        "samples": attack_samples,
    }
