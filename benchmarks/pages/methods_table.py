"""Make the table that compares the four methods with adversarial training, from the committed results.

Each method stands in front of an adversarially trained classifier, or replaces it (ARREST). The numbers of this
classifier alone, under the same attacks on the same images, stand in brackets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from purify_fast.judge.show.text import markdown_table

from ..kept import rows_of
from ..robustness.merged import FILE, read_rows

NOT_MEASURED = "not measured"
ALONE = "adversarial training alone"


class Accuracy(NamedTuple):
    """Shares of images that are classified correctly: without an attack, and under attack."""

    clean: float
    attacked: float

    def __str__(self) -> str:
        return f"{100 * self.clean:.1f} / {100 * self.attacked:.1f}"


def _of_mnist(results: Path, model: str) -> Accuracy | None:
    """Return the accuracies of a model of the study of CARSO on MNIST."""
    rows = read_rows(results / "studies" / "carso_mnist" / FILE)
    found = {row.attack: row for row in rows if row.model == model}
    return Accuracy(found["clean"].accuracy, found["worst"].accuracy) if found else None


def _of_cifar10(results: Path, model: str) -> Accuracy | None:
    rows = [row for row in rows_of(results / "studies" / "cifar10.json") if (row["name"], row["seed"]) == (model, 0)]
    return Accuracy(rows[0]["clean"], rows[0]["fast"]) if rows else None


def diffusion_draws(results: Path, model: str, when: str = "attacked") -> np.ndarray | None:
    """Return which predictions of a model are right in the study of diffusion purifiers, ``[draws, images]``.

    Args:
        results: folder of the committed results.
        model: name of the model.
        when: "clean" for the images, and "attacked" for their forms after PGD with exact gradients.
    """
    for row in rows_of(results / "studies" / "diffusion.json"):
        if (row["model"], row["process"], row["group"]) == (model, None, "exact"):
            return np.array([[bit == "1" for bit in draw] for draw in row[when]["draws"]])
    return None


def _of_diffusion(results: Path, model: str) -> Accuracy | None:
    """Return the accuracies of a single prediction in the study of diffusion purifiers."""
    clean, attacked = (diffusion_draws(results, model, when) for when in ("clean", "attacked"))
    return None if clean is None or attacked is None else Accuracy(float(clean.mean()), float(attacked.mean()))


class Method(NamedTuple):
    """A method of the table.

    Args:
        title: name of the method, as a link to its page.
        read: the functions that read the accuracies on MNIST and on CIFAR-10.
        mnist: names of the method's model and of the classifier alone; None if they were not measured.
        cifar10: the same on CIFAR-10.
        costs: name of the model in the study on CIFAR-10 whose operations were counted, if any.
    """

    title: str
    read: tuple[Callable[[Path, str], Accuracy | None], Callable[[Path, str], Accuracy | None]]
    mnist: tuple[str, str] | None
    cifar10: tuple[str, str]
    costs: str | None


STUDIES = (_of_mnist, _of_cifar10)
METHODS = (
    Method("CARSO", STUDIES, ("CARSO pipeline, z = 0", "classifier"), ("CARSO pipeline", "PGD-AT"), "CARSO pipeline"),
    Method("AToP", STUDIES, None, ("AToP pipeline", "PGD-AT"), "AToP pipeline"),
    Method("ARREST", STUDIES, None, ("ARREST, moving average", "PGD-AT"), "ARREST, moving average"),
    Method(
        "diffusion",
        (_of_diffusion, _of_diffusion),
        ("mnist-diffpure-at", "mnist-pgd-at"),
        ("cifar10-diffpure-at-w16", "cifar10-pgd-at-w16"),
        None,
    ),
)


def _accuracies(results: Path, read: Callable[[Path, str], Accuracy | None], names: tuple[str, str] | None) -> str:
    own, alone = (read(results, name) for name in names) if names else (None, None)
    return NOT_MEASURED if own is None or alone is None else f"{own} ({alone})"


def _times(results: Path, model: str | None, what: str) -> str:
    """Return the operations of a model, relative to those of adversarial training, as a text."""
    counted = {row["name"]: row[what] for row in rows_of(results / "studies" / "cifar10.json") if row["seed"] == 0}
    return f"{counted[model] / counted['PGD-AT']:.1f}" if model in counted else NOT_MEASURED


def table(results: Path) -> list[str]:
    """Return the table.

    Args:
        results: folder of the committed results.
    """
    body = []
    for method in METHODS:
        cells = (_accuracies(results, *pair) for pair in zip(method.read, (method.mnist, method.cifar10), strict=True))
        costs = (_times(results, method.costs, f"{what}_gflop") for what in ("training", "inference"))
        body.append([f"**{method.title}**", *cells, *costs])
    head = ["method", f"MNIST, clean / attacked ({ALONE}), %", f"CIFAR-10, clean / attacked ({ALONE}), %"]
    return markdown_table([*head, "cost of a training image", "cost of a prediction"], body)
