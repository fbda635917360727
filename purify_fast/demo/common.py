"""What the methods' parts of the demonstration share: its images, budgets, folders, training and attacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data
from ..attacks import AutoAttack
from ..evaluation import AttackSpec, Report, evaluate
from ..models.classifiers import SmallCNN
from ..training import (
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Task,
    TrainingAttack,
    fit,
    load_classifier,
    save_classifier,
)

EPS = 0.2
STANDARD, BASE = "standard", "base (PGD-AT)"
AUTOATTACK = "AutoAttack standard (CARSO: z = 0)"
CLASSIFIERS = {STANDARD: "standard", BASE: "base"}
# a higher rate and more decay than the defaults: of a dozen settings the best under attack at 96 % clean
BASE_TRAINING = ClassifierConfig(
    attack=TrainingAttack(eps=EPS, steps=7, relative_alpha=2.0, eps_warmup=0.2), learning_rate=1e-2, weight_decay=2e-2
)


@dataclass(frozen=True)
class Budget:
    """How much of everything; ours, set on digits."""

    images: int = 500
    standard_epochs: int = 20
    base_epochs: int = 120  # twice as many lose under attack
    # CARSO
    published_epochs: int = 30
    pipeline_epochs: int = 50
    steps: int = 50
    eot: int = 3
    peel_steps: int = 40
    peel_images: int = 100
    autoattack_images: int = 200
    autoattack_steps: int = 100
    autoattack_queries: int = 1000
    # AToP
    generator_epochs: int = 30
    atop_published_epochs: int = 30
    atop_pipeline_epochs: int = 20
    atop_steps: int = 40
    atop_images: int = 200
    # ARREST
    arrest_epochs: int = 40
    arrest_carso_epochs: int = 15


QUICK = Budget(
    images=60,
    standard_epochs=3,
    base_epochs=6,
    published_epochs=3,
    pipeline_epochs=3,
    steps=8,
    eot=2,
    peel_steps=8,
    peel_images=30,
    autoattack_images=8,
    autoattack_steps=4,
    autoattack_queries=20,
    generator_epochs=2,
    atop_published_epochs=2,
    atop_pipeline_epochs=1,
    atop_steps=4,
    atop_images=20,
    arrest_epochs=2,
    arrest_carso_epochs=1,
)


@cache
def digits() -> data.DataSet:
    """The images: 1,297 to train on, 500 held out."""
    return data.load_dataset("digits")


@dataclass(frozen=True)
class Place:
    """Where a demonstration keeps its files, how much it does, and whether it shows its progress."""

    out: Path
    budget: Budget
    seed: int
    progress: bool = True

    def quiet(self) -> Place:
        """The same, for a process beside the one that is watched."""
        return replace(self, progress=False)

    def train(self, task: Task, epochs: int, batch_size: int, folder: str) -> None:
        """Train, or go on with it, in the folder of that name."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # batches of small images: a second thread costs more than it brings
        try:
            config = FitConfig(epochs, batch_size, self.seed)
            images = digits()
            fit(task, images.x_train, images.y_train, config, self.out / folder, folder, progress=self.progress)
        finally:
            torch.set_num_threads(threads)

    def attacked(self, model: nn.Module, name: str, folder: str, attacks: list[AttackSpec], **options: Any) -> Report:
        """Attack a model on the held-out images; finished rows are kept in the folder and reused."""
        images, budget = digits(), self.budget
        options = {"steps": budget.steps, "eot_iter": budget.eot, "batch_size": 250, "max_forward_batch": 500} | options
        return evaluate(
            model,
            images.x_test[: budget.images],
            images.y_test[: budget.images],
            eps=EPS,
            attacks=attacks,
            seed=self.seed,
            out=self.out / folder,
            name=name,
            progress=self.progress,
            **options,
        )

    def classifier(self, name: str) -> nn.Module:
        """The trained `STANDARD` or `BASE`."""
        return load_classifier(self.out / CLASSIFIERS[name])

    def train_classifier(self, name: str) -> None:
        """`STANDARD`, or `BASE`: adversarially trained, until more training stopped helping."""
        torch.manual_seed(self.seed)
        model = SmallCNN()
        config, epochs = ClassifierConfig(), self.budget.standard_epochs
        if name == BASE:
            config, epochs = BASE_TRAINING, self.budget.base_epochs
        folder = CLASSIFIERS[name]
        self.train(ClassifierTask(model, config), epochs, 64, folder)
        save_classifier(model, self.out / folder)


def autoattack(budget: Budget) -> AttackSpec:
    """AutoAttack's row, the same for every model.

    A random model is attacked in its deterministic mode (CARSO: z = 0), the only one that its standard version is for.
    """
    attack = AutoAttack(steps=budget.autoattack_steps, n_queries=budget.autoattack_queries)
    return AttackSpec(attack, variant="deterministic", max_images=budget.autoattack_images, label=AUTOATTACK)


def percent(report: Report, attack: str) -> str:
    """A row's accuracy, as the sentences say it."""
    row = report.row(attack)
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f} %"


def against(report: Report, other: Report, attack: str, what: str) -> str:
    """The paired difference between two models under one attack, and what it is worth."""
    paired = report.paired(other, attack)
    difference, error = paired.difference, 2 * paired.standard_error
    verdict = "better than" if difference > error else "worse than" if difference < -error else "not told from"
    return f"{paired}, {verdict} {what} by two standard errors"
