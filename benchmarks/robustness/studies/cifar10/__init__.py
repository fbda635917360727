"""A study of CARSO, AToP and ARREST on CIFAR-10 at L-inf 8/255, compared with single networks.

A row of a table is a model, and a line is the dictionary with the numbers of a row. Models are compared by the main
protocol, which attacks the most images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from purify_fast import data
from purify_fast._files import write_text
from purify_fast._places import usable_device
from purify_fast.defences import StochasticDefence, WithAggregation
from purify_fast.evaluation import EvaluateConfig, Report, evaluate

from ...merged import FILE, merge
from .. import Job, Work, folder_of, result_of, write_page
from . import models, study
from .study import Budget, Judging, budget_of

#: The name of the results. The file STEM.json has the numbers, and the folder STEM has reports.
STEM = "cifar10"
#: The type of functions ``job(name, work, *needs, **settings)``, which make jobs with one seed and common settings.
MakeJob = Callable[..., Job]


def trainings(job: MakeJob, seed: int, budget: Budget) -> list[Job]:
    """Return the trainings of a seed, in an order in which each training comes after those that it needs.

    The first seed has all trainings. The other seeds have only the trainings of `study.COMPARED`, and the trainings
    that these need.
    """
    every = [
        job(study.BASE, models.train_base, how={}),
        job(study.CARSO, models.train_carso, study.BASE),
        job(study.STANDARD, models.train_standard),
        job(study.CARSO_PIPELINE, models.train_carso, study.BASE, study.CARSO),
        job(study.GENERATOR, models.train_atop, study.BASE),
        job(study.ATOP, models.train_atop, study.BASE, study.GENERATOR),
        job(study.ATOP_PIPELINE, models.train_atop, study.BASE, study.GENERATOR),
        job(study.ATOP_STANDARD, models.train_atop, study.STANDARD, study.BASE, study.GENERATOR),
        job(study.AFT, models.finetune, study.STANDARD),
        job(study.ARREST_EMA, models.finetune, study.STANDARD),
        job(study.CARSO_DISTILLED, models.train_carso, study.BASE, study.CARSO),
    ]
    if seed > 0:
        return every
    return [
        *every,
        job(study.TRADES, models.train_base, how={"trades": True}),
        job(study.CARSO_ARREST, models.train_carso, study.BASE, study.ARREST_EMA, study.CARSO),
        job(study.ATOP_ZERO, models.train_atop, study.BASE, study.GENERATOR),
        *(job(study.share_name(share), models.train_base, how={"share": share}) for share in budget.shares),
        job(study.LARGE, models.train_base, how={"large": True}),
        job(study.LONG, models.train_base, study.BASE, how={"long": True}),
    ]


def judgings(job: MakeJob, seed: int, budget: Budget) -> list[Job]:
    """Return the jobs that evaluate the models of a seed.

    All models are evaluated by the protocol `Judging.main`, by which models are compared. The models of the first seed
    are also evaluated by `strong`, on fewer images.
    """
    counts = budget.judging

    def judged(name: str, protocol: str, *needs: str) -> Job:
        needs = needs or (study.TRAINED_AS.get(name, name),)
        return job(study.judged_name(name, protocol), judge, *needs, judging=counts, model=name, protocol=protocol)

    rows = study.COMPARED if seed > 0 else study.rows(budget)
    every = [judged(name, counts.main) for name in rows]
    if seed > 0 or counts.strong == 0:
        return every
    return [*every, *(judged(name, "strong", study.judged_name(name, counts.main)) for name in rows)]


def jobs(path: str, budget: Budget, device: str = "cpu") -> list[Job]:
    """Return all jobs. Evaluations are listed first, so that each model is evaluated directly after its training."""
    shared = {"data": path, "device": device, "budget": budget.training}
    ordered: list[Job] = []
    for seed in range(budget.seeds):

        def job(name: str, work: Work, *needs: str, seed: int = seed, **more: object) -> Job:
            return Job(name, seed, work, needs, shared | more, threads=0)

        ordered += judgings(job, seed, budget)
        ordered += trainings(job, seed, budget)
    return ordered


@torch.no_grad()
def clean_accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of uint8 images that a model classifies correctly. There must be at least as many labels."""
    pairs = zip(x.split(250), y[: len(x)].split(250), strict=True)
    return sum(int((model(data.to_float(a)).argmax(1) == b).sum()) for a, b in pairs) / len(x)


def judge(job: Job, folder: Path, root: Path) -> dict:
    """Evaluate a model, and save the report. With the main protocol, also measure clean accuracy on many images.

    A defence is evaluated with its randomness switched off, so that attacks need only one draw: CARSO decodes the most
    likely latent, and AToP adds no noise.
    """
    counts: Judging = job.settings["judging"]
    name, protocol, images = job.settings["model"], job.settings["protocol"], models.images_of(job)
    model = models.model_of(job, root, name)
    if isinstance(model, StochasticDefence):
        # Without noise all samples are equal, so every aggregation gives the same prediction.
        model = WithAggregation(model, deterministic=True).eval()
    torch.manual_seed(job.seed)
    result = {}
    if protocol == counts.main:
        result["clean"] = clean_accuracy(model, images.x_test[: counts.clean], images.y_test)
    samples = (part[: getattr(counts, protocol)] for part in (images.x_test, images.y_test))
    settings: dict[str, Any] = {
        "protocol": protocol,
        "seed": job.seed,
        "config": EvaluateConfig(dataset_name="cifar10"),
    }
    report = evaluate(model, *samples, eps=study.EPS, **settings, out=folder, name=name, progress=False)
    report.save(folder, model)
    return result


@dataclass(frozen=True)
class Results:
    """The numbers of the study.

    Attributes:
        lines: lines by the row's name and seed. Pages quote single numbers of these lines.
        reports: reports of the main protocol, by the row's name and seed.
    """

    lines: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    reports: dict[tuple[str, int], Report] = field(default_factory=dict)

    def judged(self, names: Sequence[str], seed: int) -> list[str]:
        """Return those of the given rows that have a line. The committed results lack a few rows."""
        return [name for name in names if (name, seed) in self.lines]

    def save(self, folder: Path) -> None:
        """Write the numbers, and the rows of all models."""
        for seed in sorted({seed for _, seed in self.reports}):
            merged = merge(report for (_, of), report in self.reports.items() if of == seed)
            merged.save(folder / STEM / (f"report-{seed}.json" if seed else FILE))
        write_text(folder / f"{STEM}.json", json.dumps(list(self.lines.values()), indent=1) + "\n")


def collect(root: Path, budget: Budget) -> Results:
    """Collect the results in the folders of the jobs."""
    results, main = Results(), budget.judging.main
    for seed in range(budget.seeds):
        for name in study.rows(budget):
            if seed == 0 or name in study.COMPARED:
                results.lines[name, seed] = _row_line(root, name, seed, budget.judging)
                results.reports[name, seed] = judged_report(root, name, seed, main)
    return results


def judged_report(root: Path, name: str, seed: int, protocol: str) -> Report:
    """Return the report of the evaluation of a row's model by a protocol."""
    folder = folder_of(root, study.judged_name(name, protocol), seed)
    return Report.from_json((folder / "report.json").read_text())


def _row_line(root: Path, name: str, seed: int, counts: Judging) -> dict[str, Any]:
    """Return a row's line, with the accuracies and costs of its model."""
    judged = result_of(root, study.judged_name(name, counts.main), seed)
    facts = result_of(root, study.TRAINED_AS.get(name, name), seed)
    protocols = counts.protocols(seed)
    rows = {protocol: judged_report(root, name, seed, protocol).headline for protocol in protocols}
    line = {"name": name, "seed": seed, "clean": judged["clean"]}
    line |= {protocol: row.accuracy for protocol, row in rows.items()}
    if unreliable := [protocol for protocol, row in rows.items() if not row.reliable]:
        line["unreliable"] = unreliable
    return line | {key: facts[key] for key in ("parameters", "inference_gflop", "training_gflop")}


def percent(share: float, images: int) -> str:
    """Return a share in percent, with its binomial standard error."""
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / images) ** 0.5:.1f}"


def tradeoff(clean: float, robust: float) -> str:
    """Return the sum of two accuracies in points, and their harmonic mean (NRR) in percent, as cells of a table."""
    clean, robust = 100 * clean, 100 * robust
    total = clean + robust
    return f"{total:.1f} | {2 * clean * robust / total if total > 0 else 0:.1f}"


def differences(results: Results, counts: Judging, seed: int) -> list[str]:
    """Return a list item for each pair in `PAIRS`, with the paired difference of the models under the main protocol."""
    reports = {name: report for (name, of), report in results.reports.items() if of == seed}
    return [
        f"- `{name}` minus `{other}`, under `{counts.main}`: {reports[name].paired(reports[other])}."
        for name, other in study.PAIRS
        if name in reports and other in reports
    ]


def write_table(folder: Path, results: Results, budget: Budget) -> Path:
    """Write the page of the study."""
    given = {"results": results, "study": study, "training": budget.training, "counts": budget.judging}
    return write_page(folder, STEM, (percent, tradeoff, differences), budget=budget, **given)


def write(root: Path, folder: Path, budget: Budget) -> Path:
    """Write the page of the study, its numbers and reports into ``folder``."""
    results = collect(root, budget)
    results.save(folder)
    return write_table(folder, results, budget)


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """Return the jobs of the chosen options."""
    return jobs(chosen.data, budget_of(chosen.amount), usable_device("auto"))


def write_results(root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
    """Write the page and the results of the chosen options."""
    return write(root, folder, budget_of(chosen.amount))
