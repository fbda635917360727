"""The base of the studies on digits, whose tables compare many trainings with the classifier without a defence."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from examples.demo import setting
from purify_fast import load_defence
from purify_fast._files import write_text
from purify_fast.attacks import AutoAttack
from purify_fast.defences import stochastic
from purify_fast.evaluation import AttackSpec, EvaluateConfig
from purify_fast.evaluation.asked.subject import Variant
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierTask, FitConfig, fit, load_classifier, save_classifier

from . import Job, Study, Work, over_seeds, result_of, settings_of, write_page

EPS = setting.EPS
AUTO = "AutoAttack"
#: The numbers of trainings of each row, for the two kinds of rows in settings.yaml.
SEEDS, ABLATION_SEEDS = 3, 1


def effort(quick: bool) -> SimpleNamespace:
    """Return the steps, restarts and images of the attacks from settings.yaml. A quick run has fewer of each."""
    return SimpleNamespace(**settings_of("digits")["quick" if quick else "default"])


def zero_attacks(randomised: bool, quick: bool, auto: bool = True) -> tuple[list[AttackSpec], dict[str, str]]:
    """Return attacks on a model without its randomness: PGD with cross-entropy and DLR, and AutoAttack if requested.

    Args:
        randomised: True if the model is random.
        quick: True for a quick run.
        auto: True to add AutoAttack.

    Returns:
        The attacks, and the label of the report's row for each key of the result.
    """
    amount = effort(quick)
    variant: Variant = "deterministic" if randomised else "random"
    attacks = setting.ce_then_dlr(variant)
    rows = {
        "clean": "clean, deterministic" if randomised else "clean",
        # PGD with DLR attacks only the images that PGD with cross-entropy did not break, so its row is that of both.
        "pgd": f"PGD-{amount.steps} dlr" + (", deterministic" if randomised else ""),
    }
    if auto:
        auto_attack = AutoAttack(steps=amount.auto_steps, n_queries=amount.queries)
        attacks.append(AttackSpec(auto_attack, variant=variant, survivors_only=True, label=AUTO))
        rows["autoattack"] = AUTO
    return attacks, rows


def ball_of(job: Job) -> dict[str, Any]:
    """Return the radius and the norm of a job's attacks."""
    return {"eps": job.settings.get("eps", EPS), "norm": job.settings.get("norm", "linf")}


def attacked(
    model: nn.Module,
    job: Job,
    attacks: Sequence[AttackSpec],
    rows: dict[str, str],
) -> dict:
    """Attack a model. Return the accuracies, and whether the attacks had usable gradients.

    A random model also has the accuracy of one draw, under the key with ``_draw`` at its end.

    Args:
        model: attacked classifier or defence.
        job: job with the seed of the attacks, and with the settings ``quick`` and, optionally, ``eps`` and ``norm``.
        attacks: list of attacks.
        rows: label of the report's row for each key of the result.
    """
    amount, ball = effort(job.settings["quick"]), ball_of(job)
    config = EvaluateConfig(steps=amount.steps, n_eval=3, seed=job.seed)
    report = setting.attacked(model, amount.images, list(attacks), config=config, progress=False, **ball)
    healthy = all(r.reliable for r in report.rows if r.kind not in ("autoattack", "worst"))
    found = {key: report.row(row) for key, row in rows.items()}
    result = {key: row.accuracy for key, row in found.items()}
    result |= {f"{key}_draw": row.mean for key, row in found.items() if row.n_eval > 1}
    return result | {"gradients": "healthy" if healthy else "BAD"}


def train_base(job: Job, folder: Path, root: Path) -> dict:
    """Train a classifier adversarially, or on clean images if the setting ``standard`` is True."""
    s, digits = job.settings, setting.digits()
    torch.manual_seed(job.seed)
    model = SmallCNN(width=s.get("width", 16))
    trained = ball_of(job) | ({"eps": 0.0} if s.get("standard") else {})
    config = replace(setting.BASE_TRAINING, attack=replace(setting.BASE_TRAINING.attack, **trained))
    epochs = 2 if s["quick"] else s["epochs"]
    fit(ClassifierTask(model, config), digits.x_train, digits.y_train, FitConfig(epochs, 64, job.seed), folder)
    save_classifier(model, folder)
    attacks, rows = zero_attacks(False, s["quick"])
    return attacked(model, job, attacks, rows) | {"parameters": count(model)}


def with_samples(job: Job, root: Path) -> nn.Module:
    """Return the trained defence of another row, with another number of samples in a prediction."""
    s = job.settings
    defence = load_defence(job.folder(root, s["start"]), load_classifier(job.folder(root, s["base"])))
    return stochastic.with_samples(defence, s["samples"])


def count(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())


class DigitsStudy(Study):
    """A study on digits, whose rows are defined in settings.yaml.

    Attributes:
        works: the functions of the jobs, by their names in settings.yaml.
    """

    amounts: ClassVar[dict[str, str]] = {"quick": "run everything in a minute or two; the numbers mean nothing"}
    works: ClassVar[dict[str, Work]]

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add no options. The digits need no folder, because they are part of this package."""

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """Return the jobs of all rows. Rows that have all seeds come first."""
        table, jobs = settings_of(self.name), []
        for part, seeds in (("rows", SEEDS), ("ablations", ABLATION_SEEDS)):
            for seed in range(seeds):
                for name, row in table[part].items():
                    needs = tuple(row[key] for key in ("base", "start") if key in row)
                    settings = row | {"quick": chosen.amount == "quick"}
                    jobs.append(Job(name, seed, self.works[row["work"]], needs, settings))
        return jobs

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """Write ``NAME.json`` with all numbers, and the page ``NAME.md``."""
        results = [result_of(root, job.name, job.seed) for job in self.jobs(chosen)]
        write_text(folder / f"{self.name}.json", json.dumps(results, indent=1) + "\n")
        return self.write_table(results, folder, chosen.amount == "quick")

    def write_table(self, results: Sequence[dict], folder: Path, quick: bool) -> Path:
        """Write the page ``NAME.md``. It shows how much each row differs from the base with the same seed."""
        rows: dict[str, dict[int, dict]] = {}
        for result in results:
            rows.setdefault(result["name"], {})[result["seed"]] = result

        def values(name: str, key: str) -> list[float]:
            return [result[key] for result in rows[name].values() if key in result]

        def mean(name: str, key: str) -> str:
            return over_seeds(found) if (found := values(name, key)) else "-"

        def number(name: str, key: str, places: int) -> str:
            return f"{statistics.fmean(found):,.{places}f}" if (found := values(name, key)) else "-"

        def to_base(name: str, key: str) -> str:
            base = "base, L2" if name.endswith("L2") else "base"
            before = rows.get(base, {}) if name != base else {}
            changes = [
                result[key] - before[seed][key]
                for seed, result in rows[name].items()
                if seed in before and key in result
            ]
            return over_seeds(changes) if changes else "-"

        functions = (mean, to_base, number)
        return write_page(folder, self.name, functions, rows=rows, quick=quick, amount=effort(quick))
