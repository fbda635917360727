"""What the studies on MNIST share: the data, the classifiers, one model's attacks, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from purify_fast import data
from purify_fast._files import write_text
from purify_fast.evaluation import Report, evaluate
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit, save_classifier
from purify_fast.training.config import TrainingAttack

from . import Job
from .job_folders import save_report

EPS = 0.3


def load(root: str, train_images: int, images: int) -> data.DataSet:
    """The first so many images to train on, and to attack."""
    whole = data.load_dataset("mnist", root)
    n, m = train_images, images
    return data.DataSet(
        whole.x_train[:n], whole.y_train[:n], whole.x_test[:m], whole.y_test[:m], name="mnist", num_classes=10
    )


def train_classifier(
    job: Job,
    folder: Path,
    mnist: data.DataSet,
    width: int,
    epochs: int,
    eps: float = EPS,
    steps: int = 7,
    alpha: float | None = None,
) -> nn.Module:
    """A classifier trained on PGD examples, or with eps 0 on clean images."""
    torch.manual_seed(job.seed)
    model = SmallCNN(1, 10, (28, 28), width)
    attack = TrainingAttack(eps=eps, steps=steps, alpha=alpha, relative_alpha=2.0, eps_warmup=0.5)
    config = ClassifierConfig(attack=attack, learning_rate=1e-2, weight_decay=1e-3)
    fit(ClassifierTask(model, config), mnist.x_train, mnist.y_train, FitConfig(epochs, 128, job.seed), folder)
    save_classifier(model, folder)
    return model


def attack(job: Job, folder: Path, model: nn.Module, mnist: data.DataSet, **options: Any) -> dict[str, float]:
    """Attack the job's model with `evaluate`'s options and keep the rows; returns the accuracies."""
    options = {"max_forward_batch": 1000, **options}
    report = evaluate(
        model, mnist.x_test, mnist.y_test, eps=EPS, batch_size=250, seed=job.seed, out=folder,
        name=job.settings["model"], dataset_name=mnist.name, progress=False, **options,
    )  # fmt: skip
    return save_report(report, folder)


def write(
    whole: Report, folder: Path, name: str, lines: Sequence[str], models: Mapping[str, nn.Module] | None = None
) -> Path:
    """``name.md`` with the lines and what could not be run; in ``name`` the whole report with its pictures."""
    whole.save(folder / name, models)
    notes = ["", *(f"- {note}" for note in whole.notes)] if whole.notes else []
    write_text(folder / f"{name}.md", "\n".join([*lines, *notes]) + "\n")
    return folder / f"{name}.md"
