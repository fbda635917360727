"""The jobs of the study on CIFAR-10, and the functions that evaluate its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from purify_fast import data
from purify_fast.attacks import PGD
from purify_fast.defences import StochasticDefence, WithAggregation
from purify_fast.evaluation import AttackSpec, EvaluateConfig, evaluate

from .. import Job, Work
from . import models, study
from .study import Budget, Judging

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
        *(judged(name, study.AUTHORS) for name in study.AS_AUTHORS),
        *(job(study.tried_name(name), judge_candidate, name, judging=counts, model=name) for name in study.TRIED),
        judged(study.BEST, counts.main, *map(study.tried_name, study.CANDIDATES)),
        *(judged(name, "strong", study.judged_name(name, counts.main)) for name in strong),
    ]


def jobs(path: str, budget: Budget, device: str = "cpu") -> list[Job]:
    """Return all jobs. Evaluations are listed first, so that each model is evaluated directly after its training.

    Args:
        path: folder of CIFAR-10.
        budget: amounts of training and evaluation.
        device: device that trains and evaluates, by its name in PyTorch.
    """
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
    """Return the share of images that a model classifies correctly.

    Args:
        model: classifier or defence, images in [0, 1] to logits.
        x: images, uint8 ``[N, C, H, W]``.
        y: labels, int64. There must be at least N labels.
    """
    pairs = zip(x.split(250), y[: len(x)].split(250), strict=True)
    return sum(int((model(data.to_float(a)).argmax(1) == b).sum()) for a, b in pairs) / len(x)


def attacked(job: Job, root: Path, name: str) -> nn.Module:
    """Load the model that is evaluated, with a defence's randomness switched off, so that attacks need only one draw.

    Without randomness, CARSO decodes the most likely latent, and AToP adds no noise. In the rows of
    `study.AS_AUTHORS` the defence keeps its randomness.
    """
    model = models.model_of(job, root, name)
    if isinstance(model, StochasticDefence) and name not in study.AS_AUTHORS:
        # Without noise all samples are equal, so every aggregation gives the same prediction.
        return WithAggregation(model, deterministic=True).eval()
    return model


def judge(job: Job, folder: Path, root: Path) -> dict:
    """Evaluate a model. With the main protocol or the authors' attacks, also measure clean accuracy on many images."""
    counts: Judging = job.settings["judging"]
    name, protocol, images = job.settings["model"], job.settings["protocol"], models.images_of(job)
    if name == study.BEST:
        # The best candidate is chosen with the first seed. Later seeds train only this candidate.
        name = models.best(job, root) if job.seed == 0 else job.result(root, study.BEST)["model"]
    model = attacked(job, root, name)
    torch.manual_seed(job.seed)
    result: dict = {"model": name}
    config, attacks = EvaluateConfig(protocol=protocol), None
    if protocol in (counts.main, study.AUTHORS):
        result["clean"] = clean_accuracy(model, images.x_test[: counts.clean], images.y_test)
    if protocol == study.AUTHORS:
        seen: dict = {"aggregation": "peel_reference"} if name == study.PEEL else {"target": "classifier"}
        attacks = [AttackSpec(PGD(loss=loss), **seen) for loss in ("ce", "dlr")]
        # Use smaller batches to save memory, because each image has several samples and draws.
        config = EvaluateConfig(steps=job.settings["budget"].carso_steps, max_forward_batch=250)
    count = getattr(counts, protocol)
    samples = images.x_test[:count], images.y_test[:count]
    return result | {protocol: _lowest(job, folder, model, name, samples, config, attacks)}


def judge_candidate(job: Job, folder: Path, root: Path) -> dict:
    """Evaluate a candidate on held-out training images."""
    counts, name = job.settings["judging"], job.settings["model"]
    model, (x, y) = attacked(job, root, name), models.held_out(job, counts.held_out)
    torch.manual_seed(job.seed)
    clean, few, config = clean_accuracy(model, x, y), counts.candidates, EvaluateConfig(protocol=counts.tried)
    return {"clean": clean, "tried": _lowest(job, folder, model, name, (x[:few], y[:few]), config)}


def _lowest(
    job: Job,
    folder: Path,
    model: nn.Module,
    name: str,
    samples: tuple[torch.Tensor, torch.Tensor],
    config: EvaluateConfig,
    attacks: list[AttackSpec] | None = None,
) -> dict:
    """Evaluate a model, save the report, and return its lowest accuracy."""
    config = replace(config, seed=job.seed, dataset_name="cifar10")
    how: dict[str, Any] = {"attacks": attacks, "out": folder, "name": name, "progress": False}
    report = evaluate(model, *samples, eps=study.EPS, config=config, **how)
    report.save(folder, model)
    lowest = report.headlines[name]
    return {"share": lowest.accuracy, "images": lowest.n, "reliable": lowest.reliable}
