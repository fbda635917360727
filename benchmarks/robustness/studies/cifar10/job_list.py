"""The jobs of the study on CIFAR-10: trainings, and judgings of each model by this package's own engine."""

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

#: The type of functions ``job(name, work, *needs, **settings)``, which make the jobs of one seed with common settings.
MakeJob = Callable[..., Job]


def trainings(job: MakeJob, seed: int, budget: Budget) -> list[Job]:
    """The trainings of a seed, each after its start; the first seed has all, the others only the compared models."""
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
        # Lambda and phi, and the best candidate, are chosen once, by the first seed. The other seeds need its jobs.
        tried = [(study.tried_name(name), 0) for name in study.ELIGIBLE]
        return [
            *every,
            job(study.ARREST_EMA, models.finetune, study.STANDARD, *((search, 0) for search in searches)),
            job(study.BEST, models.train_carso, study.STANDARD, study.BASE, study.CARSO, *tried),
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
        job(study.MIXED, models.mix, study.STANDARD, study.BASE),
        *(job(name, models.train_carso, study.BASE, study.CARSO) for name in study.CANDIDATES),
        *(job(study.share_name(share), models.train_base, how={"share": share}) for share in budget.shares),
        job(study.LARGE, models.train_base, how={"large": True}),
        job(study.AWP, models.train_base, how={"awp": True}),
        job(study.LONG, models.train_base, study.BASE, how={"long": True}),
    ]


def trainings_on_given(job: MakeJob, seed: int) -> list[Job]:
    """The trainings of `ON_GIVEN`, on a base of the zoo and one standard classifier for all seeds."""
    first = (models.train_standard,) if seed == 0 else (models.take_standard, (study.STANDARD, 0))
    return [
        job(study.BASE, models.take_base),
        job(study.STANDARD, *first),
        job(study.GENERATOR, models.train_atop, study.BASE),
        job(study.ATOP, models.train_atop, study.BASE, study.GENERATOR),
        job(study.ATOP_STANDARD, models.train_atop, study.STANDARD, study.BASE, study.GENERATOR),
        job(study.ARREST_EMA, models.finetune, study.STANDARD),
    ]


def judgings(job: MakeJob, seed: int, budget: Budget, given: bool) -> list[Job]:
    """The jobs that judge the models of a seed.

    All models are judged by the protocol that compares models. The models of the first seed are also judged by further
    protocols, on fewer images, and the candidates of the first seed on held-out training images.
    """
    counts = budget.judging

    def judged(name: str, protocol: str, *needs: str) -> Job:
        needs = needs or (study.TRAINED_AS.get(name, name),)
        return job(study.judged_name(name, protocol), judge, *needs, judging=counts, model=name, protocol=protocol)

    rows = study.ON_GIVEN if given else study.COMPARED if seed > 0 else study.rows(budget)
    every = [judged(name, counts.main) for name in rows]
    if seed > 0:
        return every
    strong = counts.strong > 0
    if given:
        every.append(judged(study.ALONE, study.AUTHORS))
        return every + [judged(name, "strong") for name in study.ON_GIVEN if strong]
    # The protocol strong has all attacks of standard and more. If strong compares the models, standard runs too, for
    # the comparison with the official AutoAttack.
    compared = [name for name in ("standard", "official") if getattr(counts, name) > 0 and name != counts.main]
    further = [(name, protocol) for name in study.OFFICIAL for protocol in compared]
    further += [(name, "strong") for name in (*rows, study.BEST) if strong]
    return [
        *every,
        *(judged(name, study.AUTHORS) for name in study.AS_AUTHORS),
        *(job(study.tried_name(name), judge_candidate, name, judging=counts, model=name) for name in study.TRIED),
        judged(study.BEST, counts.main, *map(study.tried_name, study.ELIGIBLE)),
        *(judged(name, protocol, study.judged_name(name, counts.main)) for name, protocol in further),
    ]


def jobs(path: str, budget: Budget, device: str = "cpu", base: str | None = None) -> list[Job]:
    """All jobs, each as early as possible: a model is judged once it is trained, so that the table grows row by row.

    Args:
        path: the folder of CIFAR-10.
        budget: amounts of everything.
        device: torch's name of the device that trains and judges.
        base: name in the zoo of a given base, for only `ON_GIVEN`; None trains and judges everything.
    """
    shared = {"data": path, "device": device, "budget": budget.training} | ({} if base is None else {"base": base})
    ordered: list[Job] = []
    for seed in range(budget.seeds):

        def job(name: str, work: Work, *needs: str | tuple[str, int], seed: int = seed, **more: object) -> Job:
            return Job(name, seed, work, needs, shared | more, threads=0)

        waiting = judgings(job, seed, budget, base is not None)
        for training in trainings(job, seed, budget) if base is None else trainings_on_given(job, seed):
            ordered.append(training)
            there = {job.name for job in ordered if job.seed == seed}
            for judging in list(waiting):
                if there.issuperset(judging.needs):
                    waiting.remove(judging)
                    ordered.append(judging)
                    there.add(judging.name)
        ordered += waiting
    return ordered


@torch.no_grad()
def clean_accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of images that are classified correctly.

    Args:
        model: images to logits.
        x: uint8 ``[N, C, H, W]``.
        y: labels, int64 ``[N]`` or more.
    """
    pairs = zip(x.split(250), y[: len(x)].split(250), strict=True)
    return sum(int((model(data.to_float(a)).argmax(1) == b).sum()) for a, b in pairs) / len(x)


def attacked(job: Job, root: Path, name: str) -> nn.Module:
    """The judged model: a random defence predicts without noise, so that attacks need no average over draws.

    study.CARSO decodes the most likely latent, and AToP adds no noise.
    """
    model = models.model_of(job, root, name)
    if isinstance(model, StochasticDefence) and name not in study.AS_AUTHORS:
        # Without noise all samples are equal, so any aggregation gives their prediction.
        return WithAggregation(model, deterministic=True).eval()
    return model


def judge(job: Job, folder: Path, root: Path) -> dict:
    """Run a protocol; with the protocol that compares models, also measure clean accuracy on many images."""
    counts: Judging = job.settings["judging"]
    name, protocol, images = job.settings["model"], job.settings["protocol"], models.images_of(job)
    if name == study.BEST:
        # The first seed chooses the best candidate. For another seed, take the row that its training has used.
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
        # Each image has several samples and draws, so smaller batches are needed to save memory.
        config = EvaluateConfig(steps=job.settings["budget"].carso_steps, max_forward_batch=250)
    count = getattr(counts, protocol)
    samples = images.x_test[:count], images.y_test[:count]
    return result | {protocol: _lowest(job, folder, model, name, samples, config, attacks)}


def judge_candidate(job: Job, folder: Path, root: Path) -> dict:
    """Judge a candidate on held-out training images."""
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
    """Evaluate a model on some images, keep the report, and return its lowest accuracy."""
    config = replace(config, seed=job.seed, dataset_name="cifar10")
    how: dict[str, Any] = {"attacks": attacks, "out": folder, "name": name, "progress": False}
    report = evaluate(model, *samples, eps=study.EPS, config=config, **how)
    report.save(folder, model)
    lowest = report.headlines[name]
    return {"share": lowest.accuracy, "images": lowest.n, "reliable": lowest.reliable}
