"""AToP on MNIST, L-inf eps 0.3: what attacks through the whole defence leave of it, and which training helps.

On a classifier trained on clean images the purifier only pre-trained, fine-tuned with the paper's objective (FGSM on
the classifier) and fine-tuned through the whole pipeline; on an adversarially trained classifier the last of these.
Each is attacked with full gradients and, for comparison, as in the paper's ablation: on the classifier alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from purify_fast import load_defence
from purify_fast.attacks import PGD
from purify_fast.data import DataSet
from purify_fast.evaluation import AttackSpec, merge
from purify_fast.methods.atop import Atop, AtopConfig, SmallGenerator
from purify_fast.training import load_classifier

from . import Job, atop, mnist
from .attacked import counts, joined

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


@dataclass(frozen=True)
class Budget:
    """Everything that can be chosen. What follows the name of a stage is `AtopConfig`'s, but for what is named here.

    ``*_images``: the first so many; ``*_epochs`` over these. ``pipeline_start``: where both fine-tunings through the
    pipeline begin: ``AToP pre-trained only`` or ``AToP, paper's objective``. ``attack_first_steps``: of a PGD with one
    draw that comes before the costly ones, which then attack what it left.
    """

    data_train_images: int = 60000
    data_images: int = 1000
    classifier_width: int = 11
    classifier_robust_epochs: int = 6
    classifier_standard_epochs: int = 2
    defence_width: int = 8
    defence_residual: bool = True  # one that paints learns to paint black
    defence_sigma: float = 0.25
    defence_mask_ratio: float = 0.25
    defence_block: int = 4
    defence_samples: int = 1
    pretraining_images: int = 30000
    pretraining_epochs: int = 1
    pretraining_batch_size: int = 64
    pretraining_learning_rate: float = 1e-3
    pretraining_reconstruction_weight: float = 1.0
    pretraining_gan_weight: float = 0.1
    pretraining_discriminator_width: int = 16
    pretraining_schedule: str = "one_cycle"
    pretraining_precision: str = "float32"
    objective_images: int = 60000
    objective_epochs: int = 1
    objective_batch_size: int = 64
    objective_learning_rate: float = 2e-3
    objective_cls_weight: float = 0.1
    objective_reconstruction_weight: float = 1.0
    objective_reconstruction_target: str = "clean"
    objective_cls_delay: int = 0
    objective_schedule: str = "one_cycle"
    objective_precision: str = "float32"
    pipeline_start: str = PRETRAINED
    pipeline_images: int = 60000
    pipeline_epochs: int = 1
    pipeline_batch_size: int = 64
    pipeline_steps: int = 7
    pipeline_learning_rate: float = 2e-3
    pipeline_cls_weight: float = 1.0
    pipeline_reconstruction_weight: float = 0.1
    pipeline_reconstruction_target: str = "adversarial"
    pipeline_cls_delay: int = 0
    pipeline_schedule: str = "one_cycle"
    pipeline_precision: str = "float32"
    attack_first_steps: int = 20
    attack_steps: int = 50
    attack_eot: int = 5


FULL = Budget(
    data_images=10000, classifier_robust_epochs=40, pretraining_images=60000, pretraining_epochs=10,
    objective_images=60000, objective_epochs=10, pipeline_images=60000, pipeline_epochs=10, pipeline_steps=7,
    attack_steps=200, attack_eot=20,
)  # fmt: skip
QUICK = Budget(
    data_train_images=1280, data_images=20, classifier_width=4, classifier_robust_epochs=1,
    defence_width=2, pretraining_images=64, pretraining_discriminator_width=2, objective_images=64, pipeline_images=64,
    pipeline_steps=1, attack_first_steps=1, attack_steps=2, attack_eot=2,
)  # fmt: skip


def _part(settings: dict, stage: str) -> dict:
    """The settings of one stage, without its name."""
    return {name.removeprefix(f"{stage}_"): v for name, v in settings.items() if name.startswith(f"{stage}_")}


def _images(job: Job) -> DataSet:
    return mnist.load(job.settings["data"], job.settings["data_train_images"], job.settings["data_images"])


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    s = job.settings
    epochs = s["classifier_robust_epochs" if s["eps"] else "classifier_standard_epochs"]
    mnist.train_classifier(job, folder, _images(job), s["classifier_width"], epochs, eps=s["eps"])
    return {}


def pretrain(job: Job, folder: Path, root: Path) -> dict:
    """The purifier on clean images, with L1 and a discriminator; its classifier takes no part."""
    images, made, stage = _images(job), _part(job.settings, "defence"), _part(job.settings, "pretraining")
    torch.manual_seed(job.seed)
    generator = SmallGenerator(1, made.pop("width"), residual=made.pop("residual"))
    defence = Atop(load_classifier(job.folder(root, STANDARD)), generator, images.image_shape, **made)
    return atop.train(job, folder, defence, AtopConfig.pretraining(**atop.options(stage)), images, stage=stage)


def finetune(job: Job, folder: Path, root: Path) -> dict:
    """With the paper's objective, or through the pipeline, from another row's purifier."""
    s = job.settings
    stage, how = _part(s, s["stage"]), atop.PIPELINE if s["stage"] == "pipeline" else {}
    config = atop.attacked({**stage, **how}, mnist.EPS)
    return atop.train(job, folder, _model(job, root, s["start"], s["base"]), config, _images(job), stage=stage)


def _model(job: Job, root: Path, name: str, base: str) -> nn.Module:
    """A classifier, or a row's purifier in front of one; pre-training knew no classifier, and any will do."""
    classifier = load_classifier(job.folder(root, base))
    return classifier if name == base else load_defence(job.folder(root, name), classifier, check=False)


def _attacks(name: str, settings: dict) -> list[AttackSpec]:
    """The rows of one model; one label for all models."""
    first, steps, eot = (settings[f"attack_{what}"] for what in ("first_steps", "steps", "eot"))
    attacks = [
        AttackSpec(PGD(loss="ce", steps=first, eot_iter=1), label=f"PGD-{first} ce, EOT 1"),
        AttackSpec(PGD(loss="ce"), survivors_only=True, label=f"then PGD-{steps} ce, EOT {eot}"),
        AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"then PGD-{steps} dlr, EOT {eot}"),
    ]
    if name != BASES[name]:
        attacks.append(AttackSpec(PGD(loss="ce"), target="classifier", label=f"weak protocol: PGD-{steps} ce"))
    return attacks


def attack(job: Job, folder: Path, root: Path) -> dict:
    s = job.settings
    name = s["model"]
    model = _model(job, root, name, BASES[name])
    return mnist.attack(
        job, folder, model, _images(job), _attacks(name, s), steps=s["attack_steps"], eot=s["attack_eot"], chunk=250
    )


def jobs(path: str, seed: int = 0, budget: Budget = Budget()) -> list[Job]:
    """What each model's training and attack depend on stands in its job: other settings of others leave it be."""
    whole = asdict(budget)

    def parts(*stages: str) -> dict:
        return {name: value for name, value in whole.items() if name.startswith(tuple(f"{s}_" for s in stages))}

    if budget.pipeline_start not in (PRETRAINED, OBJECTIVE):
        raise ValueError(f"pipeline_start must be {PRETRAINED!r} or {OBJECTIVE!r}, got {budget.pipeline_start!r}")
    classifier = {"data": path, **parts("data", "classifier")}
    pretrained = classifier | parts("defence", "pretraining")
    objective = pretrained | parts("objective") | {"stage": "objective", "start": PRETRAINED, "base": STANDARD}
    before = objective if budget.pipeline_start == OBJECTIVE else pretrained
    pipeline = before | parts("pipeline") | {"stage": "pipeline", "start": budget.pipeline_start}
    made = [
        Job(STANDARD, seed, train_classifier, (), {**classifier, "eps": 0.0}),
        Job(ROBUST, seed, train_classifier, (), {**classifier, "eps": mnist.EPS}),
        Job(PRETRAINED, seed, pretrain, (STANDARD,), pretrained),
        Job(PIPELINE, seed, finetune, (STANDARD, budget.pipeline_start), {**pipeline, "base": STANDARD}),
        Job(ROBUST_PIPELINE, seed, finetune, (ROBUST, budget.pipeline_start), {**pipeline, "base": ROBUST}),
        Job(OBJECTIVE, seed, finetune, (STANDARD, PRETRAINED), objective),
    ]
    attacks = [
        Job(f"{j.name} attacked", seed, attack, (j.name,), {**j.settings, **parts("attack"), "model": j.name})
        for j in made
    ]
    # the costly ones first
    return made + [job for name in reversed(BASES) for job in attacks if job.settings["model"] == name]


def caption(budget: Budget, seed: int) -> str:
    """What was trained and how it was attacked."""
    b = budget
    return (
        f"MNIST, the first {b.data_images} test images, L-inf eps {mnist.EPS}, seed {seed}; accuracy ± standard error, "
        f"%. Classifiers: {b.classifier_standard_epochs} epochs on clean images, {b.classifier_robust_epochs} of "
        f"PGD-7. AToP: RT2 with sigma {b.defence_sigma}, {b.defence_mask_ratio:.1%} of the blocks of {b.defence_block} "
        f"pixels hidden, S = {b.defence_samples}; a small generator (ours, "
        f"{'correcting the image' if b.defence_residual else 'painting the image'}), pre-trained on "
        f"{b.pretraining_images:,} images (epochs {b.pretraining_epochs}; weight of the GAN term "
        f"{b.pretraining_gan_weight}); from there, with the paper's attack and loss (FGSM on the classifier, lambda "
        f"{b.objective_cls_weight}, L1 to {b.objective_reconstruction_target} images; delay, rate and schedule own: "
        f"{b.objective_cls_delay}, {b.objective_learning_rate}, {b.objective_schedule}) on "
        f"{b.objective_images:,} (epochs {b.objective_epochs}); through the pipeline "
        f"(PGD-{b.pipeline_steps} through the whole defence, lambda {b.pipeline_cls_weight}, L1 "
        f"{b.pipeline_reconstruction_weight}), from `{b.pipeline_start}`, on {b.pipeline_images:,} (epochs "
        f"{b.pipeline_epochs}). "
        "Attacks: full gradients through the whole defence; each that begins with `then` attacks what those before it "
        "left, and counts every image; under attack an image counts if each of five predictions is right. The weak "
        "protocol attacks the classifier alone, as the paper's ablation does (tables 7 and 8), and is in no `worst`."
    )


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = Budget()) -> Path:
    """``atop_mnist.md`` and its JSON and pictures in ``folder``."""
    job = Job("report", seed, attack)
    found = {name: joined([job.folder(root, f"{name} attacked")]) for name in BASES}
    whole = merge(found.values())
    minutes = {name: job.result(root, name)["minutes"] for name in BASES}
    pairs = ((OBJECTIVE, PRETRAINED), (PIPELINE, OBJECTIVE), (ROBUST_PIPELINE, ROBUST))
    lines = [
        caption(budget, seed),
        "",
        *whole.comparison(),
        "",
        *(f"- {name} minus {other}, worst: {found[name].paired(found[other])}." for name, other in pairs),
        f"- Minutes of training, one thread: {', '.join(f'{name} {spent:.1f}' for name, spent in minutes.items())}.",
        "",
        *counts(whole),
    ]
    models = {name: _model(job, root, name, base) for name, base in BASES.items()}
    return mnist.write(whole, folder, "atop_mnist", lines, models)
