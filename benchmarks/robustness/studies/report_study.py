"""The base of the studies on MNIST, which attack a few models and make a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from purify_fast import data, load_defence
from purify_fast.evaluation import AttackSpec, EvaluateConfig, Report, evaluate, merge
from purify_fast.evaluation.results.rows import worst_rows
from purify_fast.evaluation.show.tables import draws, percent, single_predictions
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import (
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    Task,
    fit,
    load_classifier,
    save_classifier,
)
from purify_fast.training.config import TrainingAttack

from . import Job, Study, result_of, settings_of, write_page

#: The L-inf radius of the studies on MNIST, in image units.
EPS = 0.3
#: The type of functions ``job(name, work, *needs, **settings)``, which make jobs with the common settings of a study.
MakeJob = Callable[..., Job]


def images_of(job: Job) -> data.DataSet:
    """Return a data set with the first training images, and the first test images, that the budget allows."""
    whole, budget = data.load_dataset(job.settings["dataset"], job.settings["data"]), job.settings["budget"]
    n, m = budget.train_images, budget.images
    return replace(
        whole, x_train=whole.x_train[:n], y_train=whole.y_train[:n], x_test=whole.x_test[:m], y_test=whole.y_test[:m]
    )


def train_classifier(job: Job, folder: Path, root: Path) -> dict:
    """Train a classifier on MNIST with PGD, or on clean images if eps is 0."""
    s, images = job.settings, images_of(job)
    torch.manual_seed(job.seed)
    model = SmallCNN(1, 10, (28, 28), s["budget"].width)
    attack = TrainingAttack(
        eps=s.get("eps", EPS), steps=s.get("steps", 7), alpha=s.get("alpha"), relative_alpha=2.0, eps_warmup=0.5
    )
    config = ClassifierConfig(attack=attack, learning_rate=1e-2, weight_decay=1e-3)
    last = train(job, folder, ClassifierTask(model, config), images, s["epochs"])
    save_classifier(model, folder)
    return last


def train(job: Job, folder: Path, task: Task, images: data.DataSet, epochs: int) -> dict:
    """Train on all training images, and return the metrics of the last epoch."""
    return fit(task, images.x_train, images.y_train, FitConfig(epochs, 128, job.seed), folder)


class ReportStudy(Study):
    """A study whose jobs train a few models and attack each of them.

    Attributes:
        models: for each column of the table, the name of the job that trains the attacked model.
        bases: for each column of the table, the name of the job that trains the classifier inside this model.
        sizes: batch sizes of `evaluate`.
    """

    models: ClassVar[dict[str, str]]
    bases: ClassVar[dict[str, str]]
    sizes: ClassVar[dict[str, int]] = {"batch_size": 250, "max_forward_batch": 1000}

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        """Return the jobs that train."""
        raise NotImplementedError

    def model(self, job: Job, root: Path, name: str) -> nn.Module:
        """Return the attacked model of a column of the table: a classifier, or a defence with its classifier."""
        trained, base = self.models[name], self.bases[name]
        classifier = load_classifier(job.folder(root, base))
        return classifier if trained == base else load_defence(job.folder(root, trained), classifier)

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        """Return the attacks on a model, in groups that run separately. The labels are the same for all models."""
        raise NotImplementedError

    def page(self, reports: dict[str, Report], budget: SimpleNamespace) -> dict[str, Any]:
        """Return further variables for the page's template."""
        return {}

    def budget(self, chosen: argparse.Namespace) -> SimpleNamespace:
        return SimpleNamespace(**settings_of(self.name)[chosen.amount])

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        budget = self.budget(chosen)
        common = {"data": chosen.data, "dataset": "mnist", "budget": budget}

        def job(name: str, work: Callable, *needs: str, **more: Any) -> Job:
            return Job(name, 0, work, needs, common | more)

        attacks = [
            job(f"{name} {group}", self.attack, trained, model=name, group=group)
            for name, trained in self.models.items()
            for group in self.attacks(name, budget)
        ]
        return [*self.trainings(job, budget), *attacks]

    def attack(self, job: Job, folder: Path, root: Path) -> dict:
        """Run a group of attacks on a model. Write the report into the job's folder, and return the accuracies."""
        name, budget, images = job.settings["model"], job.settings["budget"], images_of(job)
        model = self.model(job, root, name)
        amount: dict[str, Any] = {"steps": budget.steps, "eot_iter": budget.eot, **self.sizes}
        config = EvaluateConfig(seed=job.seed, dataset_name=images.name, **amount)
        attacks = self.attacks(name, budget)[job.settings["group"]]
        how: dict[str, Any] = {"out": folder, "name": name, "progress": False}
        report = evaluate(model, images.x_test, images.y_test, eps=EPS, config=config, attacks=attacks, **how)
        report.save(folder, model)
        return {row.attack: row.accuracy for row in report.rows}

    def reports(self, root: Path, budget: SimpleNamespace) -> dict[str, Report]:
        """Return a report for each model, with the rows of all groups of attacks, and the worst case over all of them.

        The groups ran separately, so that all models face the same attacks. In a single list of attacks, APGD on a
        classifier would skip the images that PGD has broken. APGD on a defence would not skip such images, because it
        attacks the defence without its randomness.
        """
        reports = {}
        for name in self.models:
            folders = [Job(f"{name} {group}", 0, self.attack).folder(root) for group in self.attacks(name, budget)]
            parts = [Report.from_json((folder / "report.json").read_text()) for folder in folders]
            # Every group has the row of the clean accuracy. The dictionary contains this row only once.
            rows = {row.attack: row for part in parts for row in part.rows if row.kind != "worst"}
            notes = dict.fromkeys(note for part in parts for note in part.notes)
            # The parts have the same settings, so most facts about the first part are facts about all of them.
            about = {what: told for what, told in parts[0].about.items() if what not in ("command", "date")}
            whole = [*rows.values(), *worst_rows(list(rows.values()))]
            reports[name] = Report(whole, list(notes), about)
        return reports

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        budget = self.budget(chosen)
        reports = self.reports(root, budget)
        facts = {name: result_of(root, name, 0) for name in dict.fromkeys(self.models.values())}
        whole = merge(reports.values())
        # Remove the report of an earlier run, because Git keeps it. Otherwise `save` would move it into a subfolder.
        (folder / self.name / "report.json").unlink(missing_ok=True)
        whole.save(folder / self.name)

        functions = (draws, percent, single_predictions)
        given = {"study": self, "whole": whole, "reports": reports, "facts": facts, "b": budget}
        return write_page(folder, self.name, functions, **given, **self.page(reports, budget))
