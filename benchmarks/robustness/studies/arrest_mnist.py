"""A study of ARREST on MNIST at L-inf eps 0.3, beside adversarial training (AT) and adversarial finetuning (AFT)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from purify_fast.attacks import PGD, AutoAttack
from purify_fast.evaluation import AttackSpec, Report
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.training import load_classifier, save_classifier
from purify_fast.training.config import TrainingAttack

from ..tradeoff import Tradeoff
from . import Job
from .report_study import EPS, MakeJob, ReportStudy, images_of, train, train_classifier

STANDARD, SCRATCH, FINETUNED, ARREST = "standard", "AT from scratch", "AFT", "ARREST"


def alpha(budget: SimpleNamespace) -> float:
    """Return the length of a step of PGD in all trainings, in image units."""
    return budget.step_length * EPS / budget.training_steps


def config(budget: SimpleNamespace, name: str) -> ArrestConfig:
    """Return the settings with which a model is finetuned: by ARREST, or by AFT for every other name."""
    b = budget
    attack = TrainingAttack(eps=EPS, steps=b.training_steps, alpha=alpha(b), eps_warmup=b.warm_up)
    whole = name == ARREST
    weight = b.weight if whole else 0.0
    return ArrestConfig(attack=attack, angle=b.angle, distillation_weight=weight, replay=whole, **b.finetuning)


def finetune(job: Job, folder: Path, root: Path) -> dict:
    budget, images = job.settings["budget"], images_of(job)
    task = ArrestTask(load_classifier(job.folder(root, STANDARD)), config(budget, job.name), images.image_shape)
    if task.teacher is not None:
        task.teacher.keep(images.x_train, progress=False)
    last = train(job, folder, task, images, budget.epochs)
    save_classifier(task.result, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    shares = [row["replayed"] for row in log if "replayed" in row][: (budget.epochs + 1) // 2]
    return last | {"replayed": sum(shares) / max(1, len(shares))}


class ArrestMnist(ReportStudy):
    """The study of ARREST on MNIST, compared with adversarial training from scratch and with finetuning."""

    name = "arrest_mnist"
    bases: ClassVar[dict[str, str]] = {name: name for name in (STANDARD, SCRATCH, FINETUNED, ARREST)}
    models: ClassVar[dict[str, str]] = {**bases}

    def trainings(self, job: MakeJob, budget: SimpleNamespace) -> list[Job]:
        pgd = {"steps": budget.training_steps, "alpha": alpha(budget)}
        return [
            job(STANDARD, train_classifier, epochs=budget.standard_epochs, eps=0.0, **pgd),
            job(SCRATCH, train_classifier, epochs=budget.scratch_epochs, **pgd),
            job(FINETUNED, finetune, STANDARD),
            job(ARREST, finetune, STANDARD),
        ]

    def attacks(self, name: str, budget: SimpleNamespace) -> dict[str, list[AttackSpec]]:
        b = budget
        auto = AutoAttack(steps=b.autoattack_steps, n_queries=b.queries)
        return {
            "attacked": [
                AttackSpec(PGD()),
                AttackSpec(PGD(loss="dlr"), survivors_only=True, label=f"then PGD-{b.steps} dlr"),
                AttackSpec(auto, survivors_only=True, max_images=b.autoattack, label=self.auto_label(b)),
            ]
        }

    def auto_label(self, budget: SimpleNamespace) -> str:
        return f"then AutoAttack standard, first {budget.autoattack}"

    def page(self, reports: dict[str, Report], budget: SimpleNamespace) -> dict[str, Any]:
        auto, sums = self.auto_label(budget), {}
        for name, report in reports.items():
            clean, worst = report.row("clean"), report.row("worst")
            first = float(clean.robust[: budget.autoattack].mean())
            both = Tradeoff(100 * clean.accuracy, 100 * worst.accuracy)
            sums[name] = both, Tradeoff(100 * first, 100 * report.row(auto).accuracy)
        return {"sums": sums, "auto": auto}
