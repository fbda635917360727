"""AToP on MNIST, L-inf eps 0.3: what attacks through the whole defence leave of it, and which training helps.

On a classifier trained on clean images the purifier only pre-trained, fine-tuned with the paper's objective (FGSM on
the classifier) and fine-tuned through the whole pipeline; on an adversarially trained classifier the last of these.
Each is attacked with full gradients and, for comparison, as in the paper's ablation: on the classifier alone.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from purify_fast import load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import PGD
from purify_fast.data import DataSet
from purify_fast.evaluation import AttackSpec, merge
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.training import FitConfig, TrainingAttack, fit, load_classifier

from . import Job, mnist
from .job_folders import counts, joined

THROUGH_PIPELINE = {"attack_method": "pgd", "attack_target": "pipeline"}
_OPTIONS = {field.name for field in fields(AtopConfig)}


def options(settings: dict) -> dict:
    """Those of the settings that are `AtopConfig`'s; its attack's are left to `attacked_config`."""
    return {name: value for name, value in settings.items() if name in _OPTIONS}


def attacked_config(settings: dict, eps: float) -> AtopConfig:
    """The config of a stage that trains on attacked images, with as many steps as the settings say."""
    return AtopConfig(attack=TrainingAttack(eps=eps, steps=settings.get("steps", 10)), **options(settings))


def train_stage(job: Job, folder: Path, defence: Atop, config: AtopConfig, images: DataSet, stage: dict) -> dict:
    """Train and save the defence's purifier; the last epoch's metrics.

    ``stage`` has ``epochs``, ``batch_size`` and, unless all are used, ``images``: so many of the first. The other
    names in it are the config's.
    """
    n = stage.get("images", len(images.x_train))
    fitting = FitConfig(stage["epochs"], stage["batch_size"], job.seed)
    task = AtopTask(defence, config, weights_fingerprint(defence))
    last = fit(task, images.x_train[:n], images.y_train[:n], fitting, folder)
    defence.save(folder)
    return last


STANDARD, ROBUST = "standard classifier", "PGD-AT classifier"
PRETRAINED, OBJECTIVE, PIPELINE = "AToP pre-trained only", "AToP, paper's objective", "AToP pipeline"
ROBUST_PIPELINE = "AToP pipeline on PGD-AT"
BASES = {
    STANDARD: STANDARD,
    PRETRAINED: STANDARD,
    OBJECTIVE: STANDARD,
    PIPELINE: STANDARD,
    ROBUST: ROBUST,
    ROBUST_PIPELINE: ROBUST,
}  # every model and the classifier in it


#: How much of everything, by part. In that of a stage, ``images`` are the first so many and ``epochs`` are over these;
#: the other names are `AtopConfig`'s, but for ``batch_size`` and ``steps``. ``first_steps`` are those of a PGD with one
#: draw that comes before the costly ones, which then attack what it left.
Budget = dict[str, dict]
_STAGE = {"epochs": 1, "batch_size": 64, "schedule": "one_cycle"}
DEFAULT: Budget = {
    "amount": {"train_images": 60000, "images": 1000},
    "classifier": {"width": 11, "robust_epochs": 6, "standard_epochs": 2},
    # a generator that paints, in place of one that corrects, learns to paint black
    "generator": {"width": 8, "residual": True},
    "defence": {"sigma": 0.25, "mask_ratio": 0.25, "block": 4, "samples": 1},
    PRETRAINED: {**_STAGE, "images": 30000, "learning_rate": 1e-3, "gan_weight": 0.1, "discriminator_width": 16},
    OBJECTIVE: _STAGE
    | {"images": 60000, "learning_rate": 2e-3, "cls_weight": 0.1, "reconstruction_target": "clean", "cls_delay": 0},
    PIPELINE: _STAGE
    | {"images": 60000, "learning_rate": 2e-3, "cls_weight": 1.0, "reconstruction_weight": 0.1, "cls_delay": 0}
    | {"steps": 7, **THROUGH_PIPELINE},
    "attack": {"first_steps": 20, "steps": 50, "eot": 5},
}


def changed(budget: Budget, changes: Budget) -> Budget:
    """A budget with other numbers in some parts."""
    return {part: settings | changes.get(part, {}) for part, settings in budget.items()}


FULL = changed(
    DEFAULT,
    {
        "amount": {"images": 10000},
        "classifier": {"robust_epochs": 40},
        PRETRAINED: {"images": 60000, "epochs": 10},
        OBJECTIVE: {"epochs": 10},
        PIPELINE: {"epochs": 10},
        "attack": {"steps": 200, "eot": 20},
    },
)
QUICK = changed(
    DEFAULT,
    {
        "amount": {"train_images": 1280, "images": 20},
        "classifier": {"width": 4, "robust_epochs": 1},
        "generator": {"width": 2},
        PRETRAINED: {"images": 64, "discriminator_width": 2},
        OBJECTIVE: {"images": 64},
        PIPELINE: {"images": 64, "steps": 1},
        "attack": {"first_steps": 1, "steps": 2, "eot": 2},
    },
)


def _images(job: Job) -> DataSet:
    return mnist.load(job.settings["data"], **job.settings["amount"])


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    s = job.settings
    mnist.train_classifier(job, folder, _images(job), s["width"], s["epochs"], eps=s["eps"])
    return {}


def pretrain(job: Job, folder: Path, root: Path) -> dict:
    """The purifier on clean images, with L1 and a discriminator; its classifier takes no part."""
    s, images = job.settings, _images(job)
    torch.manual_seed(job.seed)
    generator = SmallGenerator(1, **s["generator"])
    defence = Atop(load_classifier(job.folder(root, STANDARD)), generator, images.image_shape, **s["defence"])
    config = AtopConfig.pretraining(**options(s["stage"]))
    return train_stage(job, folder, defence, config, images, stage=s["stage"])


def finetune(job: Job, folder: Path, root: Path) -> dict:
    """With the paper's objective, or through the pipeline, from the pre-trained purifier."""
    s = job.settings
    config = attacked_config(s["stage"], mnist.EPS)
    return train_stage(job, folder, _model(job, root, PRETRAINED, s["base"]), config, _images(job), stage=s["stage"])


def _model(job: Job, root: Path, name: str, base: str) -> nn.Module:
    """A classifier, or a row's purifier in front of one; pre-training knew no classifier, and any will do."""
    classifier = load_classifier(job.folder(root, base))
    return classifier if name == base else load_defence(job.folder(root, name), classifier, check=False)


def _attacks(name: str, settings: dict) -> list[AttackSpec]:
    """The rows of one model; one label for all models."""
    first, steps, eot = settings.values()
    attacks = [
        AttackSpec(PGD(loss="ce", steps=first, eot_iter=1), label=f"PGD-{first} ce, EOT 1"),
        AttackSpec(PGD(loss="ce"), survivors_only=True, label=f"then PGD-{steps} ce, EOT {eot}"),
        AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"then PGD-{steps} dlr, EOT {eot}"),
    ]
    if name != BASES[name]:
        attacks.append(AttackSpec(PGD(loss="ce"), target="classifier", label=f"weak protocol: PGD-{steps} ce"))
    return attacks


def attack(job: Job, folder: Path, root: Path) -> dict:
    name, how = job.settings["model"], job.settings["attack"]
    model, attacks = _model(job, root, name, BASES[name]), _attacks(name, how)
    options = {"attacks": attacks, "steps": how["steps"], "eot_iter": how["eot"], "max_forward_batch": 250}
    return mnist.attack(job, folder, model, _images(job), **options)


def jobs(path: str, seed: int = 0, budget: Budget = DEFAULT) -> list[Job]:
    """What each model's training and attack depend on stands in its job: other settings of others leave it be."""
    networks = budget["classifier"]
    shared = {"data": path, "amount": budget["amount"], "width": networks["width"]}
    standard = shared | {"eps": 0.0, "epochs": networks["standard_epochs"]}
    robust = shared | {"eps": mnist.EPS, "epochs": networks["robust_epochs"]}
    purifier = {part: budget[part] for part in ("generator", "defence")}
    pretrained = standard | purifier | {"stage": budget[PRETRAINED]}
    before = {"before": budget[PRETRAINED]}
    objective = standard | purifier | before | {"stage": budget[OBJECTIVE], "base": STANDARD}
    pipeline = purifier | before | {"stage": budget[PIPELINE]}
    trainings = [
        Job(STANDARD, seed, train_classifier, (), standard),
        Job(ROBUST, seed, train_classifier, (), robust),
        Job(PRETRAINED, seed, pretrain, (STANDARD,), pretrained),
        Job(PIPELINE, seed, finetune, (STANDARD, PRETRAINED), standard | pipeline | {"base": STANDARD}),
        Job(ROBUST_PIPELINE, seed, finetune, (ROBUST, PRETRAINED), robust | pipeline | {"base": ROBUST}),
        Job(OBJECTIVE, seed, finetune, (STANDARD, PRETRAINED), objective),
    ]
    attacks = {}
    for job in trainings:
        settings = job.settings | {"attack": budget["attack"], "model": job.name}
        attacks[job.name] = Job(f"{job.name} attacked", seed, attack, (job.name,), settings)
    # the costly ones first
    return trainings + [attacks[name] for name in reversed(BASES)]


def caption(budget: Budget, seed: int) -> str:
    """What was trained and how it was attacked."""
    networks, defence = budget["classifier"], budget["defence"]
    first, objective, pipeline = (budget[stage] for stage in (PRETRAINED, OBJECTIVE, PIPELINE))
    return (
        f"MNIST, the first {budget['amount']['images']} test images, L-inf eps {mnist.EPS}, seed {seed}; accuracy ± "
        f"standard error, %. Classifiers: {networks['standard_epochs']} epochs on clean images, "
        f"{networks['robust_epochs']} of PGD-7. AToP: RT2 with sigma {defence['sigma']}, "
        f"{defence['mask_ratio']:.1%} of the blocks of {defence['block']} pixels hidden, S = {defence['samples']}; "
        f"a small generator (ours, correcting the image), pre-trained on {first['images']:,} images (epochs "
        f"{first['epochs']}; weight of the GAN term {first['gan_weight']}); from there, with the paper's attack and "
        f"loss (FGSM on the classifier, lambda {objective['cls_weight']}, L1 to {objective['reconstruction_target']} "
        f"images; delay, rate and schedule own: {objective['cls_delay']}, {objective['learning_rate']}, "
        f"{objective['schedule']}) on {objective['images']:,} (epochs {objective['epochs']}); through the pipeline "
        f"(PGD-{pipeline['steps']} through the whole defence, lambda {pipeline['cls_weight']}, L1 "
        f"{pipeline['reconstruction_weight']}), from `{PRETRAINED}`, on {pipeline['images']:,} (epochs "
        f"{pipeline['epochs']}). "
        "Attacks: full gradients through the whole defence; each that begins with `then` attacks what those before it "
        "left, and counts every image; under attack an image counts if each of five predictions is right. The weak "
        "protocol attacks the classifier alone, as the paper's ablation does (tables 7 and 8), and is in no `worst`."
    )


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = DEFAULT) -> Path:
    """``atop_mnist.md`` and its JSON and pictures in ``folder``."""
    job = Job("report", seed, attack)
    reports = {name: joined([job.folder(root, f"{name} attacked")]) for name in BASES}
    whole = merge(reports.values())
    minutes = {name: job.result(root, name)["minutes"] for name in BASES}
    pairs = ((OBJECTIVE, PRETRAINED), (PIPELINE, OBJECTIVE), (ROBUST_PIPELINE, ROBUST))
    lines = [
        caption(budget, seed),
        "",
        *whole.comparison(),
        "",
        *(f"- {name} minus {other}, worst: {reports[name].paired(reports[other])}." for name, other in pairs),
        f"- Minutes of training, one thread: {', '.join(f'{name} {spent:.1f}' for name, spent in minutes.items())}.",
        "",
        *counts(whole),
    ]
    models = {name: _model(job, root, name, base) for name, base in BASES.items()}
    return mnist.write(whole, folder, "atop_mnist", lines, models)
