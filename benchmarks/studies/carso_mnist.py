"""CARSO on MNIST, L-inf eps 0.3: what is left of its robustness under attacks with exact gradients.

Four models: an adversarially trained classifier, CARSO on it with the paper's objective, attacked through the output
its authors attack (PeeL) and through exact gradients, and CARSO fine-tuned through the whole pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from purify_fast import load_defence
from purify_fast._tensors import weights_fingerprint
from purify_fast.attacks import APGD, PGD, AutoAttack
from purify_fast.data import DataSet
from purify_fast.demo.setting import LAYERS
from purify_fast.evaluation import AttackSpec, Report, merge
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import FitConfig, fit, load_classifier
from purify_fast.training.config import TrainingAttack

from . import Job, mnist
from .job_folders import joined, save_whole

SIZES = {
    "cond_dim": 64,
    "latent_dim": 16,
    "samples": 4,
    "decoder_width": 8,
}  # K = 4: the paper's first version on MNIST
CLASSIFIER, EXACT, PIPELINE = "classifier", "CARSO, paper's objective", "CARSO pipeline"
#: `EXACT`, attacked through the output that its authors attack.
PEEL = f"{EXACT}, through PeeL"


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    width: int = 11  # 1.30 MFLOP an image, two per multiplication and addition
    base_epochs: int = 6
    objective_epochs: int = 3
    pipeline_epochs: int = 2
    images: int = 1000
    steps: int = 50
    eot: int = 5
    apgd_steps: int = 100
    autoattack: int = 100
    autoattack_eot: int = 20
    queries: int = 5000
    train_images: int = 60000


DEFAULT = Budget()
FULL = Budget(base_epochs=40, objective_epochs=20, pipeline_epochs=20, images=10000, steps=200, eot=20, autoattack=1000)
QUICK = Budget(
    width=8,
    base_epochs=1,
    objective_epochs=3,
    pipeline_epochs=1,
    images=20,
    steps=2,
    eot=2,
    apgd_steps=2,
    autoattack=4,
    autoattack_eot=2,
    queries=20,
    train_images=640,
)


def _mnist(job: Job) -> DataSet:
    budget: Budget = job.settings["budget"]
    return mnist.load(job.settings["data"], budget.train_images, budget.images)


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    budget: Budget = job.settings["budget"]
    model = mnist.train_classifier(job, folder, _mnist(job), budget.width, budget.base_epochs)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 1, 28, 28))
    return {"mflop": counter.get_total_flops() / 1e6}


def train_objective(job: Job, folder: Path, root: Path) -> dict:
    budget: Budget = job.settings["budget"]
    images = _mnist(job)
    torch.manual_seed(job.seed)
    defence = Carso(load_classifier(job.folder(root, CLASSIFIER)), LAYERS, images.image_shape, **SIZES)
    config = CarsoConfig(attack=TrainingAttack(eps=mnist.EPS, steps=40))
    fitting = FitConfig(budget.objective_epochs, 128, job.seed)
    last = fit(CarsoTask(defence, config), images.x_train, images.y_train, fitting, folder)
    save_whole(defence, folder)
    return {"kl": last["kl"]}


def train_pipeline(job: Job, folder: Path, root: Path) -> dict:
    budget: Budget = job.settings["budget"]
    images = _mnist(job)
    defence = load_defence(job.folder(root, EXACT), load_classifier(job.folder(root, CLASSIFIER)))
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=mnist.EPS, steps=7))
    task = CarsoTask(defence, config, weights_fingerprint(defence))
    fit(task, images.x_train, images.y_train, FitConfig(budget.pipeline_epochs, 128, job.seed), folder)
    save_whole(defence, folder)
    return {}


def _model(job: Job, root: Path, name: str) -> nn.Module:
    base = load_classifier(job.folder(root, CLASSIFIER))
    return base if name == CLASSIFIER else load_defence(job.folder(root, EXACT if name == PEEL else name), base)


GROUPS = ("PGD", "APGD", "AutoAttack")
AUTOATTACK = "AutoAttack rand (classifier: standard), first {}"


def _attacks(name: str, budget: Budget) -> dict[str, list[AttackSpec]]:
    """The rows of one model, in groups that can be attacked apart; one label for all models."""
    head = "peel_reference" if name == PEEL else None
    zero = "random" if name == CLASSIFIER else "deterministic"
    spec = partial(AttackSpec, aggregation=head)
    apgd = [
        spec(APGD(loss=loss, steps=budget.apgd_steps), variant=zero, survivors_only=loss != "ce", label=label)
        for loss, label in (("ce", "APGD ce, z = 0"), ("dlr_targeted", "APGD ce + APGD-T, z = 0"))
    ]
    auto = AutoAttack(
        # rand is for models that draw
        version="standard" if name == CLASSIFIER else "rand",
        steps=budget.apgd_steps,
        eot_iter=budget.autoattack_eot,
        n_queries=budget.queries,
    )
    label = AUTOATTACK.format(budget.autoattack)
    auto_row = spec(auto, max_images=budget.autoattack, label=label)
    pgd = [
        spec(PGD(loss=loss), survivors_only=loss != "ce", label=f"PGD-{budget.steps} {what}, EOT {budget.eot}")
        for loss, what in (("ce", "ce"), ("dlr", "ce + dlr"))
    ]
    return {"PGD": pgd, "APGD": apgd, "AutoAttack": [auto_row]}


def attack(job: Job, folder: Path, root: Path) -> dict:
    """One model under one group of attacks."""
    name, budget = job.settings["model"], job.settings["budget"]
    attacks = _attacks(name, budget)[job.settings["group"]]
    options = {"attacks": attacks, "steps": budget.steps, "eot_iter": budget.eot}
    return mnist.attack(job, folder, _model(job, root, name), _mnist(job), **options)


def jobs(path: str, seed: int = 0, budget: Budget = DEFAULT) -> list[Job]:
    """Training in a chain; each model is attacked as soon as it is there, beside the training of the next."""
    common = {"data": path, "budget": budget}
    chain = [
        (CLASSIFIER, train_classifier, (), (CLASSIFIER,)),
        (EXACT, train_objective, (CLASSIFIER,), (PEEL, EXACT)),
        (PIPELINE, train_pipeline, (EXACT,), (PIPELINE,)),
    ]
    made, attacks = [], []
    for name, work, needs, attacked in chain:
        made.append(Job(name, seed, work, needs, common))
        for model in attacked:
            for group in GROUPS:
                settings = {**common, "model": model, "group": group}
                attacks.append(Job(f"{model} {group}", seed, attack, (name,), settings))
    return made + attacks


def report(root: Path, seed: int = 0) -> Report:
    """All rows, from what the jobs kept."""
    job = Job("report", seed, attack)
    models = (CLASSIFIER, PEEL, EXACT, PIPELINE)
    return merge(joined(job.folder(root, f"{name} {group}") for group in GROUPS) for name in models)


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = DEFAULT) -> Path:
    """``carso_mnist.md`` and its JSON and pictures in ``folder``."""
    whole = report(root, seed)
    facts = Job(CLASSIFIER, seed, attack).result(root)
    lines = [
        f"MNIST, the first {budget.images} test images, L-inf eps {mnist.EPS}, seed {seed}; accuracy ± standard error, "
        f"%. Classifier: {facts['mflop']:.2f} MFLOP an image, {budget.base_epochs} epochs of PGD-7 with eps rising "
        f"linearly over the first half; CARSO: K = {SIZES['samples']}, {budget.objective_epochs} epochs with the "
        f"paper's objective, then {budget.pipeline_epochs} through the pipeline. Under attack an image counts if "
        f"each of five predictions is right (z = 0: the one); `ce + dlr` and `APGD ce + APGD-T` count what both leave. "
        f"AutoAttack: {budget.apgd_steps} steps, EOT {budget.autoattack_eot}.",
        "",
        *whole.comparison(),
    ]
    job = Job("report", seed, attack)
    models = {name: _model(job, root, name) for name in whole.models}
    return mnist.write(whole, folder, "carso_mnist", lines, models)
