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
from purify_fast._validation import usable_device
from purify_fast.defences import StochasticDefence, WithAggregation
from purify_fast.evaluation import EvaluateConfig, Report, evaluate, merge

from .. import Job, Work, folder_of, result_of, write_page
from . import models, study
from .picture import plot_tradeoff
from .study import Budget, Judging, budget_of

#: The name of the results. The file STEM.json has the numbers, and the folder STEM has reports and pictures.
STEM = "cifar10"
#: The type of functions ``job(name, work, *needs, **settings)``, which make jobs with one seed and common settings.
MakeJob = Callable[..., Job]


def trainings(job: MakeJob, seed: int, budget: Budget) -> list[Job]:
    """Return the trainings of a seed, in an order in which each training comes after those that it needs.

    The first seed has all trainings. The other seeds have only the trainings of `study.COMPARED`, and the trainings
    that these need.
    """
    amount = budget.training
    pairs = [(weight, angle) for weight in amount.weights for angle in amount.angles]
    searches = {study.search_name(*pair): pair for pair in pairs}
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
    ]
    if seed > 0:
        # Results of the first seed decide on lambda, phi and the best candidate, so the other seeds need its jobs.
        tried = [(study.tried_name(name), 0) for name in study.CANDIDATES]
        return [
            *every,
            job(study.ARREST_EMA, models.finetune, study.STANDARD, *((search, 0) for search in searches)),
            job(study.BEST, models.train_carso, study.BASE, study.CARSO, *tried),
        ]
    return [
        *every,
        *(
            job(name, models.search_arrest, study.STANDARD, weight=w, angle=angle)
            for name, (w, angle) in searches.items()
        ),
        job(study.ARREST_EMA, models.finetune, study.STANDARD, *searches),
        job(study.TRADES, models.train_base, how={"trades": True}),
        job(study.CARSO_ARREST, models.train_carso, study.BASE, study.ARREST_EMA, study.CARSO),
        job(study.ATOP_ZERO, models.train_atop, study.BASE, study.GENERATOR),
        *(job(name, models.train_carso, study.BASE, study.CARSO) for name in study.CANDIDATES),
        *(job(study.share_name(share), models.train_base, how={"share": share}) for share in budget.shares),
        job(study.LARGE, models.train_base, how={"large": True}),
        job(study.AWP, models.train_base, how={"awp": True}),
        job(study.LONG, models.train_base, study.BASE, how={"long": True}),
    ]


def judgings(job: MakeJob, seed: int, budget: Budget) -> list[Job]:
    """Return the jobs that evaluate the models of a seed.

    All models are evaluated by the protocol `Judging.main`, by which models are compared. The models of the first seed
    are also evaluated by `strong`, on fewer images. The candidates of the first seed are also evaluated on
    held-out training images.
    """
    counts = budget.judging

    def judged(name: str, protocol: str, *needs: str) -> Job:
        needs = needs or (study.TRAINED_AS.get(name, name),)
        return job(study.judged_name(name, protocol), judge, *needs, judging=counts, model=name, protocol=protocol)

    rows = study.COMPARED if seed > 0 else study.rows(budget)
    every = [judged(name, counts.main) for name in rows]
    if seed > 0:
        return every
    strong = [name for name in (*rows, study.BEST) if counts.strong > 0]
    return [
        *every,
        *(job(study.tried_name(name), judge_candidate, name, judging=counts, model=name) for name in study.TRIED),
        judged(study.BEST, counts.main, *map(study.tried_name, study.CANDIDATES)),
        *(judged(name, "strong", study.judged_name(name, counts.main)) for name in strong),
    ]


def jobs(path: str, budget: Budget, device: str = "cpu") -> list[Job]:
    """Return all jobs. Evaluations are listed first, so that each model is evaluated directly after its training."""
    shared = {"data": path, "device": device, "budget": budget.training}
    ordered: list[Job] = []
    for seed in range(budget.seeds):

        def job(name: str, work: Work, *needs: str | tuple[str, int], seed: int = seed, **more: object) -> Job:
            return Job(name, seed, work, needs, shared | more, threads=0)

        ordered += judgings(job, seed, budget)
        ordered += trainings(job, seed, budget)
    return ordered


@torch.no_grad()
def clean_accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of uint8 images that a model classifies correctly. There must be at least as many labels."""
    pairs = zip(x.split(250), y[: len(x)].split(250), strict=True)
    return sum(int((model(data.to_float(a)).argmax(1) == b).sum()) for a, b in pairs) / len(x)


def attacked(job: Job, root: Path, name: str) -> nn.Module:
    """Load the model that is evaluated, with a defence's randomness switched off, so that attacks need only one draw.

    Without randomness, CARSO decodes the most likely latent, and AToP adds no noise.
    """
    model = models.model_of(job, root, name)
    if isinstance(model, StochasticDefence):
        # Without noise all samples are equal, so every aggregation gives the same prediction.
        return WithAggregation(model, deterministic=True).eval()
    return model


def judge(job: Job, folder: Path, root: Path) -> dict:
    """Evaluate a model. With the main protocol, also measure clean accuracy on many images."""
    counts: Judging = job.settings["judging"]
    name, protocol, images = job.settings["model"], job.settings["protocol"], models.images_of(job)
    if name == study.BEST:
        # The best candidate is chosen with the first seed. Later seeds train only this candidate.
        name = models.best(job, root) if job.seed == 0 else job.result(root, study.BEST)["model"]
    model = attacked(job, root, name)
    torch.manual_seed(job.seed)
    result: dict = {"model": name}
    if protocol == counts.main:
        result["clean"] = clean_accuracy(model, images.x_test[: counts.clean], images.y_test)
    count = getattr(counts, protocol)
    samples = images.x_test[:count], images.y_test[:count]
    return result | {protocol: _lowest(job, folder, model, name, samples, protocol)}


def judge_candidate(job: Job, folder: Path, root: Path) -> dict:
    """Evaluate a candidate on held-out training images."""
    counts, name = job.settings["judging"], job.settings["model"]
    model, (x, y) = attacked(job, root, name), models.held_out(job, counts.held_out)
    torch.manual_seed(job.seed)
    clean, few = clean_accuracy(model, x, y), counts.candidates
    return {"clean": clean, "tried": _lowest(job, folder, model, name, (x[:few], y[:few]), counts.tried)}


def _lowest(
    job: Job, folder: Path, model: nn.Module, name: str, samples: tuple[torch.Tensor, torch.Tensor], protocol: str
) -> dict:
    """Evaluate a model, save the report, and return its lowest accuracy."""
    config = EvaluateConfig(protocol=protocol, seed=job.seed, dataset_name="cifar10")
    report = evaluate(model, *samples, eps=study.EPS, config=config, out=folder, name=name, progress=False)
    report.save(folder, model)
    lowest = report.headlines[name]
    return {"share": lowest.accuracy, "images": lowest.n, "reliable": lowest.reliable}


@dataclass(frozen=True)
class Results:
    """The numbers of the study.

    Attributes:
        lines: lines by the row's name and seed. There are further lines for the candidates on held-out images. Pages
            quote single numbers of all these lines.
        reports: reports of the main protocol, by the row's name and seed.
    """

    lines: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    reports: dict[tuple[str, int], Report] = field(default_factory=dict)

    def judged(self, names: Sequence[str], seed: int) -> list[str]:
        """Return those of the given rows that have a line. The committed results lack a few rows."""
        return [name for name in names if (name, seed) in self.lines]

    def save(self, folder: Path) -> None:
        """Write the numbers, and the report on all models."""
        for seed in sorted({seed for _, seed in self.reports}):
            merged = merge(report for (_, of), report in self.reports.items() if of == seed)
            if seed == 0:
                # Git keeps the report of an earlier run. Without this line, `save` would move it into a subfolder.
                (folder / STEM / "report.json").unlink(missing_ok=True)
                merged.save(folder / STEM)
            else:
                # Save other seeds only as JSON, because pages show the report of the first seed.
                write_text(folder / STEM / f"report-{seed}.json", merged.to_json())
        write_text(folder / f"{STEM}.json", json.dumps(list(self.lines.values()), indent=1) + "\n")


def collect(root: Path, budget: Budget) -> Results:
    """Collect the results in the folders of the jobs."""
    results, main = Results(), budget.judging.main
    for seed in range(budget.seeds):
        for name in (*study.rows(budget), study.BEST):
            if seed == 0 or name in study.COMPARED:
                results.lines[name, seed] = _row_line(root, name, seed, budget.judging)
                results.reports[name, seed] = judged_report(root, name, seed, main)
    for name in study.TRIED:
        found = result_of(root, study.tried_name(name), 0)
        line = {"name": study.tried_name(name), "seed": 0, "clean": found["clean"], "tried": found["tried"]["share"]}
        results.lines[line["name"], 0] = line | ({} if found["tried"]["reliable"] else {"unreliable": ["tried"]})
    return results


def judged_report(root: Path, name: str, seed: int, protocol: str) -> Report:
    """Return the report of the evaluation of a row's model by a protocol."""
    folder = folder_of(root, study.judged_name(name, protocol), seed)
    return Report.from_json((folder / "report.json").read_text())


def _row_line(root: Path, name: str, seed: int, counts: Judging) -> dict[str, Any]:
    """Return a row's line, with the accuracies and costs of its model."""
    judged = result_of(root, study.judged_name(name, counts.main), seed)
    facts = result_of(root, study.trained_as(judged["model"], seed), seed)
    protocols = counts.protocols(seed)
    rows = {protocol: judged_report(root, name, seed, protocol).headlines[judged["model"]] for protocol in protocols}
    line = {"name": name, "seed": seed, "model": judged["model"], "clean": judged["clean"]}
    line |= {protocol: row.accuracy for protocol, row in rows.items()}
    if unreliable := [protocol for protocol, row in rows.items() if not row.reliable]:
        line["unreliable"] = unreliable
    costs = ("parameters", "inference_gflop", "training_gflop")
    chosen = ("weight", "angle") if name == study.ARREST_EMA else ()
    return line | {key: facts[key] for key in (*costs, *chosen)}


def _error(share: float, images: int) -> float:
    """Return the binomial standard error of a share, in percentage points."""
    return 100 * (share * (1 - share) / images) ** 0.5


def percent(share: float, images: int) -> str:
    """Return a share in percent, with its binomial standard error."""
    return f"{100 * share:.1f} ± {_error(share, images):.1f}"


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
    """Write the page of the study, its numbers, reports and pictures into ``folder``."""
    results = collect(root, budget)
    results.save(folder)
    plot(results, budget, folder / STEM / "tradeoff.png")
    return write_table(folder, results, budget)


def plot(results: Results, budget: Budget, path: Path) -> None:
    """Draw robust accuracy against clean accuracy, with a curve of the bases that were trained at shares of eps."""
    counts, points = budget.judging, {}
    for name in (*study.rows(budget), study.BEST):
        line = results.lines[name, 0]
        clean, robust = line["clean"], line[counts.main]
        errors = _error(clean, counts.clean), _error(robust, getattr(counts, counts.main))
        points[name] = (100 * clean, 100 * robust, *errors)
    names = [study.STANDARD, *(study.share_name(share) for share in budget.shares), study.BASE]
    curve: dict[float, float] = {}
    for clean, robust in (points[name][:2] for name in names):
        # A curve can have only one point at each clean accuracy. Use the point with the highest robust accuracy.
        curve[clean] = max(robust, curve.get(clean, 0.0))
    # The generator is only a stage of other models; the base without moving average would cover that of the base.
    shown = {name: value for name, value in points.items() if name not in (study.GENERATOR, study.NO_EMA)}
    title = "CIFAR-10, L-inf 8/255"
    plot_tradeoff(path, shown, sorted(curve.items()), reference_name="trained at shares of eps", title=title)


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """Return the jobs of the chosen options."""
    return jobs(chosen.data, budget_of(chosen.amount), usable_device(chosen.device))


def write_results(root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
    """Write the page and the results of the chosen options."""
    return write(root, folder, budget_of(chosen.amount))
