"""The study of CARSO on MNIST at eps = 0.3, attacked as its authors do (through PeeL) and with exact gradients."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast._settings import weights_fingerprint
from purify_fast.attacks import APGD, PGD, OriginalAutoAttack
from purify_fast.defences import WithAggregation, WithoutNoise
from purify_fast.evaluation import AttackSpec, EvaluateConfig, Report, Row, evaluate
from purify_fast.judge.results.rows import worst_rows
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import FitConfig, TrainingAttack, fit
from purify_fast.training.classifier import ClassifierConfig, ClassifierTask, load_classifier, save_classifier

from ..merged import FILE, comparison, save_rows
from . import Job, folder_of, settings_of, write_page

EPS = 0.3
LAYERS = ("conv2", "conv4", "hidden")
CLASSIFIER, EXACT, PIPELINE = "classifier", "CARSO, paper's objective", "CARSO pipeline"
#: The column of the model `EXACT` under attacks through PeeL.
PEEL = f"{EXACT}, through PeeL"
#: The end of the name of a model whose latent is z = 0 in place of a random latent.
ZERO = ", z = 0"
#: For each column of the table, the name of the job that trains the attacked model.
MODELS = {CLASSIFIER: CLASSIFIER, PEEL: EXACT, EXACT: EXACT, PIPELINE: PIPELINE}


def images_of(job: Job) -> data.DataSet:
    """Return a data set with the first training images, and the first test images, that the budget allows."""
    whole, budget = data.load_dataset("mnist", job.settings["data"]), job.settings["budget"]
    n, m = budget.train_images, budget.images
    return replace(
        whole, x_train=whole.x_train[:n], y_train=whole.y_train[:n], x_test=whole.x_test[:m], y_test=whole.y_test[:m]
    )


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    """Train a classifier with PGD."""
    budget, images = job.settings["budget"], images_of(job)
    torch.manual_seed(job.seed)
    model = SmallCNN(1, 10, (28, 28), budget.width)
    attack = TrainingAttack(eps=EPS, steps=7, relative_alpha=2.0, eps_warmup=0.5)
    task = ClassifierTask(model, ClassifierConfig(attack=attack, learning_rate=1e-2, weight_decay=1e-3))
    last = fit(task, images.x_train, images.y_train, FitConfig(budget.base_epochs, 128, job.seed), folder)
    save_classifier(model, folder)
    return last


def train_purifier(job: Job, folder: Path, root: Path) -> dict:
    """Train a purifier with the paper's objective, or continue its training through the pipeline."""
    budget, images, start = job.settings["budget"], images_of(job), job.name != PIPELINE
    torch.manual_seed(job.seed)
    classifier = load_classifier(job.folder(root, CLASSIFIER))
    if start:
        defence = Carso(classifier, LAYERS, images.image_shape, **budget.defence)
    else:
        defence = load_defence(job.folder(root, EXACT), classifier)
    options = dict(budget.objective if start else budget.pipeline)
    fitting = FitConfig(options.pop("epochs"), options.pop("batch_size"), job.seed)
    attack = TrainingAttack(eps=EPS, steps=options.pop("steps"))
    task = CarsoTask(
        defence, CarsoConfig(attack=attack, **options), "scratch" if start else weights_fingerprint(defence)
    )
    last = fit(task, images.x_train, images.y_train, fitting, folder)
    defence.save(folder)
    return last


def attacks_of(
    name: str, budget: SimpleNamespace, through: nn.Module | None = None, quiet: nn.Module | None = None
) -> dict[str, list[AttackSpec]]:
    """Return the attacks on a model, in groups that run separately. The labels are the same for all models.

    Args:
        name: name of the model.
        budget: amounts of the attacks.
        through: the other model that the attacks follow, or None.
        quiet: the same model without randomness, for the attacks of the group "APGD".
    """
    b, head = budget, {"through": through}
    # AutoAttack's version "rand" is only for random models. The classifier is deterministic.
    version = "standard" if name == CLASSIFIER else "rand"
    auto = OriginalAutoAttack(version=version, steps=b.apgd_steps, eot_iter=b.autoattack_eot, n_queries=b.queries)
    auto_label = f"AutoAttack rand (classifier: standard), first {b.autoattack}"
    both = {"survivors_only": True}
    targeted = APGD(loss="dlr_targeted", steps=b.apgd_steps)
    return {
        "PGD": [
            AttackSpec(PGD(loss="ce"), label=f"PGD-{b.steps} ce, EOT {b.eot}", **head),
            AttackSpec(PGD(loss="dlr"), label=f"PGD-{b.steps} ce + dlr, EOT {b.eot}", **both, **head),
        ],
        "APGD": [
            AttackSpec(APGD(loss="ce", steps=b.apgd_steps), label="APGD ce, z = 0", through=quiet),
            AttackSpec(targeted, label="APGD ce + APGD-T, z = 0", **both, through=quiet),
        ],
        "AutoAttack": [AttackSpec(auto, max_images=b.autoattack, label=auto_label, **head)],
    }


def attack(job: Job, folder: Path, root: Path) -> dict:
    """Run a group of attacks on a model. Write the report into the job's folder, and return the accuracies."""
    name, budget, images = job.settings["model"], job.settings["budget"], images_of(job)
    classifier = load_classifier(job.folder(root, CLASSIFIER))
    model = classifier if name == CLASSIFIER else load_defence(job.folder(root, MODELS[name]), classifier)
    group, judged, title = job.settings["group"], model, name
    through = quiet = None
    if name == PEEL:
        through = WithAggregation(model, "peel_reference")
        quiet = WithAggregation(model, "peel_reference", deterministic=True)
    if group == "APGD" and name != CLASSIFIER:
        # APGD attacks CARSO with the latent z = 0 in place of a random latent. This is another model.
        judged, title = WithoutNoise(model), name + ZERO
    attacks = attacks_of(name, budget, through, quiet)[group]
    config = EvaluateConfig(dataset_name=images.name, max_forward_batch=1000)
    amount: dict[str, Any] = {"steps": budget.steps, "eot_iter": budget.eot, "seed": job.seed, "batch_size": 250}
    how: dict[str, Any] = {"attacks": attacks, "out": folder, "name": title, "config": config, "progress": False}
    report = evaluate(judged, images.x_test, images.y_test, eps=EPS, **amount, **how)
    report.save(folder, model)
    return {row.attack: row.accuracy for row in report.rows}


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """Return all trainings and attacks."""
    budget = SimpleNamespace(**settings_of("carso_mnist")[chosen.amount])
    shared = {"data": chosen.data, "budget": budget}
    return [
        Job(CLASSIFIER, 0, train_classifier, (), shared),
        Job(EXACT, 0, train_purifier, (CLASSIFIER,), shared),
        Job(PIPELINE, 0, train_purifier, (CLASSIFIER, EXACT), shared),
        *(
            Job(f"{name} {group}", 0, attack, (trained,), shared | {"model": name, "group": group})
            for name, trained in MODELS.items()
            for group in attacks_of(name, budget)
        ),
    ]


def merged_groups(reports: list[Report]) -> list[Row]:
    """Return the rows of a model, and of the same model at z = 0: the rows of all groups, and their worst case.

    The groups ran separately, so that all models face the same attacks. In a single list of attacks, APGD on a
    classifier would skip the images that PGD has broken. APGD on a defence would not skip such images, because it
    attacks the defence without its randomness, which is another model.
    """
    rows = []
    for model in dict.fromkeys(report.model for report in reports):
        # Every group has the row of the clean accuracy. The dictionary contains this row only once.
        own = [row for report in reports if report.model == model for row in report.rows if row.kind != "worst"]
        attacked = list({row.attack: row for row in own}.values())
        rows += [*attacked, *worst_rows(attacked)]
    return rows


def write_results(root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
    """Write the page and the rows of all models."""
    budget = SimpleNamespace(**settings_of("carso_mnist")[chosen.amount])
    rows, notes = list[Row](), dict[str, None]()
    for name in MODELS:
        folders = (folder_of(root, f"{name} {group}", 0) for group in attacks_of(name, budget))
        reports = [Report.from_json((place / "report.json").read_text()) for place in folders]
        rows += merged_groups(reports)
        notes |= dict.fromkeys(note for report in reports for note in report.notes)
    save_rows(folder / "carso_mnist" / FILE, rows, [*notes])
    return write_page(folder, "carso_mnist", table=comparison(rows), notes=notes, b=budget)
