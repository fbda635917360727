"""CARSO on MNIST, L-inf eps 0.3: what is left of its robustness under attacks with exact gradients.

Four models: an adversarially trained classifier, CARSO on it as published, attacked through the output its authors
attack (PeeL) and through exact gradients, and CARSO fine-tuned through the whole pipeline.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from purify_fast import data
from purify_fast._files import write_text
from purify_fast.carso import Carso, CarsoConfig, CarsoTask, load
from purify_fast.evaluation import Attack, Report, evaluate, merge
from purify_fast.nn import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit, load_classifier, save_classifier
from purify_fast.training.checkpoint import fingerprint

from . import RESULT, Job
from .attacked import joined, keep

EPS = 0.3
LAYERS = ("conv2", "conv4", "hidden")
SIZES = {
    "cond_dim": 64,
    "latent_dim": 16,
    "samples": 4,
    "decoder_width": 8,
}  # K = 4: the paper's first version on MNIST
CLASSIFIER, PEEL, EXACT, PIPELINE = "classifier", "CARSO published, through PeeL", "CARSO published", "CARSO pipeline"


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    width: int = 11  # 1.30 MFLOP an image, two per multiplication and addition
    base_epochs: int = 6
    published_epochs: int = 3
    pipeline_epochs: int = 2
    images: int = 1000
    steps: int = 50
    eot: int = 5
    apgd_steps: int = 100
    autoattack: int = 100
    autoattack_eot: int = 20
    queries: int = 5000
    train_images: int = 60000


FULL = Budget(base_epochs=40, published_epochs=20, pipeline_epochs=20, images=10000, steps=200, eot=20, autoattack=1000)
QUICK = Budget(8, 1, 1, 1, 20, 2, 2, 2, 4, 2, 20, 640)


def _mnist(root: str, budget: Budget) -> data.DataSet:
    whole = data.load("mnist", root)
    n = budget.train_images
    return data.DataSet(
        whole.x_train[:n], whole.y_train[:n], whole.x_test[: budget.images], whole.y_test[: budget.images], "mnist", 10
    )


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    budget: Budget = job.settings["budget"]
    mnist = _mnist(job.settings["data"], budget)
    torch.manual_seed(job.seed)
    model = SmallCNN(1, 10, (28, 28), budget.width)
    config = ClassifierConfig(eps=EPS, steps=7, warm_up=0.5, learning_rate=1e-2, weight_decay=1e-3)
    fit(
        ClassifierTask(model, config),
        mnist.x_train,
        mnist.y_train,
        FitConfig(budget.base_epochs, 128, job.seed),
        folder,
    )
    save_classifier(model, folder)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 1, 28, 28))
    return {"mflop": counter.get_total_flops() / 1e6}


def train_published(job: Job, folder: Path, root: Path) -> dict:
    budget: Budget = job.settings["budget"]
    mnist = _mnist(job.settings["data"], budget)
    torch.manual_seed(job.seed)
    defence = Carso(load_classifier(job.folder(root, CLASSIFIER)), LAYERS, mnist.image_shape, **SIZES)
    config = CarsoConfig(eps=EPS, steps=40)
    fitting = FitConfig(budget.published_epochs, 128, job.seed)
    last = fit(CarsoTask(defence, config), mnist.x_train, mnist.y_train, fitting, folder)
    defence.save(folder)
    return {"kl": last["kl"]}


def train_pipeline(job: Job, folder: Path, root: Path) -> dict:
    budget: Budget = job.settings["budget"]
    mnist = _mnist(job.settings["data"], budget)
    defence = load(job.folder(root, EXACT), load_classifier(job.folder(root, CLASSIFIER)))
    config = CarsoConfig(attack_target="pipeline", eps=EPS, steps=7)
    task = CarsoTask(defence, config, fingerprint(defence))
    fit(task, mnist.x_train, mnist.y_train, FitConfig(budget.pipeline_epochs, 128, job.seed), folder)
    defence.save(folder)
    return {}


def _model(job: Job, root: Path, name: str) -> nn.Module:
    base = load_classifier(job.folder(root, CLASSIFIER))
    return base if name == CLASSIFIER else load(job.folder(root, EXACT if name == PEEL else name), base)


GROUPS = ("PGD", "APGD", "AutoAttack")
AUTOATTACK = "AutoAttack rand (classifier: standard), first {}"


def _attacks(name: str, budget: Budget) -> dict[str, list[Attack]]:
    """The rows of one model, in groups that can be attacked apart; one label for all models."""
    head = "peel_reference" if name == PEEL else None
    zero = "random" if name == CLASSIFIER else "deterministic"
    apgd = [
        Attack("apgd", loss=loss, steps=budget.apgd_steps, variant=zero, head=head, survivors=loss != "ce", label=label)
        for loss, label in (("ce", "APGD ce, z = 0"), ("dlr_targeted", "APGD ce + APGD-T, z = 0"))
    ]
    auto = Attack(
        "autoattack",
        version="standard" if name == CLASSIFIER else "rand",  # rand is for models that draw
        head=head,
        limit=budget.autoattack,
        steps=budget.apgd_steps,
        eot=budget.autoattack_eot,
        queries=budget.queries,
        label=AUTOATTACK.format(budget.autoattack),
    )
    pgd = [
        Attack(loss=loss, head=head, survivors=loss != "ce", label=f"PGD-{budget.steps} {what}, EOT {budget.eot}")
        for loss, what in (("ce", "ce"), ("dlr", "ce + dlr"))
    ]
    return {"PGD": pgd, "APGD": apgd, "AutoAttack": [auto]}


def attack(job: Job, folder: Path, root: Path) -> dict:
    """One model under one group of attacks."""
    name, budget = job.settings["model"], job.settings["budget"]
    mnist = _mnist(job.settings["data"], budget)
    report = evaluate(
        _model(job, root, name), mnist.x_test, mnist.y_test, eps=EPS,
        attacks=_attacks(name, budget)[job.settings["group"]], steps=budget.steps, eot=budget.eot, batch_size=250,
        chunk=1000, seed=job.seed, out=folder, name=name, progress=False,
    )  # fmt: skip
    return keep(report, folder)


def jobs(path: str, seed: int = 0, budget: Budget = Budget()) -> list[Job]:
    """Training in a chain; each model is attacked as soon as it is there, beside the training of the next."""
    common = {"data": path, "budget": budget}
    chain = [
        (CLASSIFIER, train_classifier, (), (CLASSIFIER,)),
        (EXACT, train_published, (CLASSIFIER,), (PEEL, EXACT)),
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


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = Budget()) -> Path:
    """``carso_mnist.md`` and its JSON and pictures in ``folder``."""
    whole = report(root, seed)
    whole.save(folder / "carso_mnist")
    facts = json.loads((Job(CLASSIFIER, seed, attack).folder(root) / RESULT).read_text())
    lines = [
        f"MNIST, the first {budget.images} test images, L-inf eps {EPS}, seed {seed}; accuracy ± standard error, %. "
        f"Classifier: {facts['mflop']:.2f} MFLOP an image, {budget.base_epochs} epochs of PGD-7 with eps rising "
        f"linearly over the first half; CARSO: K = {SIZES['samples']}, {budget.published_epochs} epochs as published, "
        f"then {budget.pipeline_epochs} through the pipeline. Under attack an image counts if each of five "
        f"predictions is right (z = 0: the one); `ce + dlr` and `APGD ce + APGD-T` count what both leave. AutoAttack: "
        f"{budget.apgd_steps} steps, EOT {budget.autoattack_eot}.",
        "",
        *whole.comparison(),
        *(["", *(f"- {note}" for note in whole.notes)] if whole.notes else []),
    ]
    write_text(folder / "carso_mnist.md", "\n".join(lines) + "\n")
    return folder / "carso_mnist.md"
