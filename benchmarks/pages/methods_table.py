"""Make the table that compares the four methods with adversarial training, from the committed results.

Each method stands in front of an adversarially trained classifier, or replaces it (ARREST). The numbers of this
classifier alone, under the same attacks on the same images, stand in brackets. The line of a method is its best
measured one.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from purify_fast.judge.estimates import Estimate
from purify_fast.judge.show.text import markdown_table

from ..kept import Row, rows_of
from ..robustness.merged import FILE, read_rows

NOT_MEASURED = "not measured"
ALONE = "adversarial training alone"


def diffusion_draws(row: Row, when: str) -> np.ndarray:
    """Return which predictions are right in a row of the study of diffusion purifiers, ``[draws, images]``.

    Args:
        row: a row of PGD with exact gradients.
        when: "clean" for the images, and "attacked" for their forms after the attack.
    """
    return np.array([[bit == "1" for bit in draw] for draw in row[when]["draws"]])


def diffusion_rows(results: Path, group: str) -> dict[str, Row]:
    """Return the rows of a group of attacks in the study of diffusion purifiers, by model."""
    rows = rows_of(results / "studies" / "diffusion.json")
    return {row["model"]: row for row in rows if (row["group"], row["process"]) == (group, None)}


def _outcomes(results: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return which predictions of each model are right, clean and attacked, each bool ``[draws, images]``."""
    outcomes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for study in ("carso_mnist", "cifar10"):
        rows = {(row.model, row.attack): row.right for row in read_rows(results / "studies" / study / FILE)}
        outcomes |= {model: (rows[model, "clean"], rows[model, "worst"]) for model, attack in rows if attack == "clean"}
    for model, row in diffusion_rows(results, "exact").items():
        outcomes[model] = diffusion_draws(row, "clean"), diffusion_draws(row, "attacked")
    return outcomes


def _against(own: tuple[np.ndarray, np.ndarray], alone: tuple[np.ndarray, np.ndarray]) -> str:
    """Return the accuracies of a model and of the classifier alone, and the paired difference under attack."""
    difference = Estimate.of(own[1].astype(float) - alone[1])
    pair, other = (f"{100 * clean.mean():.1f} / {100 * attacked.mean():.1f}" for clean, attacked in (own, alone))
    return f"{pair} ({other}); {100 * difference.mean:+.1f} ± {100 * difference.error:.1f}"


class Method(NamedTuple):
    """A method of the table.

    Args:
        title: name of the method.
        mnist: names of the method's model and of the classifier alone; None if they were not measured.
        cifar10: the same on CIFAR-10.
        costs: name of the model in the study on CIFAR-10 whose operations were counted, if any.
    """

    title: str
    mnist: tuple[str, str] | None
    cifar10: tuple[str, str]
    costs: str | None = None


METHODS = (
    Method(
        "CARSO",
        ("CARSO pipeline, z = 0", "classifier"),
        ("CARSO pipeline, distilled", "PGD-AT"),
        "CARSO pipeline, distilled",
    ),
    Method("AToP", None, ("AToP pipeline, sigma 0", "PGD-AT"), "AToP pipeline, sigma 0"),
    Method("ARREST", None, ("ARREST, moving average", "PGD-AT"), "ARREST, moving average"),
    Method("diffusion", ("mnist-diffpure-at", "mnist-pgd-at"), ("cifar10-diffpure-at-w16", "cifar10-pgd-at-w16")),
)


def _times(results: Path, model: str | None, what: str) -> str:
    """Return the operations of a model, relative to those of adversarial training, as a text."""
    counted = {row["name"]: row[what] for row in rows_of(results / "studies" / "cifar10.json") if row["seed"] == 0}
    return f"{counted[model] / counted['PGD-AT']:.1f}" if model in counted else NOT_MEASURED


def table(results: Path) -> list[str]:
    """Return the table.

    Args:
        results: folder of the committed results.
    """
    body, outcomes = [], _outcomes(results)
    for method in METHODS:
        pairs = [names and [outcomes[name] for name in names] for names in (method.mnist, method.cifar10)]
        cells = (_against(*pair) if pair else NOT_MEASURED for pair in pairs)
        costs = (_times(results, method.costs, f"{what}_gflop") for what in ("training", "inference"))
        body.append([f"**{method.title}**", *cells, *costs])
    pair = f"clean / attacked ({ALONE}), %; difference under attack"
    return markdown_table(
        ["method", f"MNIST, {pair}", f"CIFAR-10, {pair}", "cost of a training image", "cost of a prediction"], body
    )
