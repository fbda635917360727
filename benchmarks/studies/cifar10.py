"""CIFAR-10 at L-inf 8/255: the three methods, by the papers' objectives and through the pipeline, beside networks.

`cifar10_models` trains; here the models are judged by this package's own engine and put into one table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from purify_fast import data
from purify_fast.attacks import PGD
from purify_fast.defences import StochasticDefence, WithAggregation
from purify_fast.evaluation import AttackSpec, evaluate

from . import Job
from .cifar10_ahead import CANDIDATES, ELIGIBLE, MIXED
from .cifar10_budget import (
    AFT,
    ALONE,
    ARREST_EMA,
    AS_AUTHORS,
    ATOP,
    ATOP_PIPELINE,
    ATOP_STANDARD,
    ATOP_ZERO,
    AUTHORS,
    AWP,
    BASE,
    BEST,
    CARSO,
    CARSO_ARREST,
    CARSO_PIPELINE,
    COMPARED,
    EPS,
    FULL,
    GENERATOR,
    LARGE,
    LONG,
    OFFICIAL,
    ON_GIVEN,
    PEEL,
    QUICK,
    STANDARD,
    TRADES,
    TRAINED_AS,
    TRIED,
    Budget,
    Judging,
    judged_name,
    main_protocol,
    rows,
    search_name,
    share_name,
    tried_name,
)
from .cifar10_models import (
    best,
    finetune,
    held_out,
    images_of,
    mix,
    model_of,
    search_arrest,
    take_base,
    take_standard,
    train_atop,
    train_base,
    train_candidate,
    train_carso,
    train_standard,
)
from .cifar10_table import write, write_given

__all__ = ["FULL", "QUICK", "Budget", "jobs", "write", "write_given"]

DEFAULT = Budget()


class Where(NamedTuple):
    """The folder of the data, and the device."""

    data: str
    device: str


def _factory(where: Where, seed: int, **shared: object) -> Callable[..., Job]:
    """``job(name, work, *needs, **settings)`` for jobs of one seed, which have some settings in common."""

    def job(name: str, work: Callable[[Job, Path, Path], dict], *needs: str | tuple[str, int], **more: object) -> Job:
        return Job(name, seed, work, needs, where._asdict() | shared | more, threads=0)

    return job


def trainings(where: Where, seed: int, budget: Budget) -> list[Job]:
    """The trainings of a seed, each behind what it starts from; the first seed has all, the others what is compared."""
    amount = budget.training
    job = _factory(where, seed, budget=amount)
    pairs = [(weight, angle) for weight in amount.weights for angle in amount.angles]
    searches = [search_name(*pair) for pair in pairs]
    made = [
        job(BASE, train_base, how={}),
        job(CARSO, train_carso, BASE),
        job(STANDARD, train_standard),
        job(CARSO_PIPELINE, train_carso, BASE, CARSO),
        job(GENERATOR, train_atop, BASE),
        job(ATOP, train_atop, BASE, GENERATOR),
        job(ATOP_PIPELINE, train_atop, BASE, GENERATOR),
        job(ATOP_STANDARD, train_atop, STANDARD, BASE, GENERATOR),
        job(AFT, finetune, STANDARD),
    ]
    if seed > 0:
        # lambda and phi are chosen once, and so is the best candidate
        tried = [(tried_name(name), 0) for name in ELIGIBLE]
        return [
            *made,
            job(ARREST_EMA, finetune, STANDARD, *((search, 0) for search in searches)),
            job(BEST, train_candidate, STANDARD, BASE, CARSO, *tried),
        ]
    return [
        *made,
        *(
            job(name, search_arrest, STANDARD, weight=weight, angle=angle)
            for name, (weight, angle) in zip(searches, pairs, strict=True)
        ),
        job(ARREST_EMA, finetune, STANDARD, *searches),
        job(TRADES, train_base, how={"trades": True}),
        job(CARSO_ARREST, train_carso, BASE, ARREST_EMA, CARSO),
        job(ATOP_ZERO, train_atop, BASE, GENERATOR),
        job(MIXED, mix, STANDARD, BASE),
        *(job(name, train_candidate, BASE, CARSO) for name in CANDIDATES),
        *(job(share_name(share), train_base, how={"share": share}) for share in budget.shares),
        job(LARGE, train_base, how={"large": True}),
        job(AWP, train_base, how={"awp": True}),
        job(LONG, train_base, BASE, how={"long": True}),
    ]


def trainings_on(base: str, where: Where, seed: int, budget: Budget) -> list[Job]:
    """The trainings of `ON_GIVEN`, on a base of the zoo and one standard classifier for all seeds.

    Args:
        base: its name in the zoo.
        where: the data and the device.
        seed: of the trainings.
        budget: how much of everything.
    """
    job = _factory(where, seed, budget=budget.training, base=base)
    standard = job(STANDARD, train_standard) if seed == 0 else job(STANDARD, take_standard, (STANDARD, 0))
    return [
        job(BASE, take_base),
        standard,
        job(GENERATOR, train_atop, BASE),
        job(ATOP, train_atop, BASE, GENERATOR),
        job(ATOP_STANDARD, train_atop, STANDARD, BASE, GENERATOR),
        job(ARREST_EMA, finetune, STANDARD),
    ]


def judgings_on(base: str, where: Where, seed: int, budget: Budget) -> list[Job]:
    """The jobs that judge the models of `ON_GIVEN` by the protocol that compares models; of the first seed also by the
    attack of AToP's notebooks, and by ``strong``.

    Args:
        base: its name in the zoo.
        where: the data and the device.
        seed: of the trainings.
        budget: how much of everything.
    """
    counts = budget.judging
    job = _factory(where, seed, budget=budget.training, judging=counts, base=base)
    names = [(name, counts.main) for name in ON_GIVEN]
    if seed == 0:
        names.append((ALONE, AUTHORS))
        names += [(name, "strong") for name in ON_GIVEN if counts.strong > 0]
    return [
        job(judged_name(name, protocol), judge, TRAINED_AS.get(name, name), model=name, protocol=protocol)
        for name, protocol in names
    ]


def judgings(where: Where, seed: int, budget: Budget) -> list[Job]:
    """The jobs that judge a seed's models by the protocol that compares them, and the first seed's candidates."""
    job = _factory(where, seed, budget=budget.training, judging=budget.judging)

    def judged(name: str, *needs: str) -> Job:
        protocol = main_protocol(name, budget.judging)
        return job(judged_name(name, protocol), judge, *needs, model=name, protocol=protocol)

    if seed > 0:
        return [judged(name, TRAINED_AS.get(name, name)) for name in COMPARED]
    return [
        *(judged(name, TRAINED_AS.get(name, name)) for name in (*rows(budget), *AS_AUTHORS)),
        *(job(tried_name(name), judge_candidate, name, model=name) for name in TRIED),
        judged(BEST, *(tried_name(name) for name in ELIGIBLE)),
    ]


def further_judgings(where: Where, budget: Budget) -> list[Job]:
    """The jobs that judge the first seed's models by further protocols, on fewer images."""
    counts = budget.judging
    job = _factory(where, 0, budget=budget.training, judging=counts)

    def judged(name: str, protocol: str) -> Job:
        needs = judged_name(name, counts.main)
        return job(judged_name(name, protocol), judge, needs, model=name, protocol=protocol)

    # `strong` has the attacks of `standard` and more; `standard` is there to be compared with the official AutoAttack
    compared = [name for name in ("standard", "official") if getattr(counts, name) > 0 and name != counts.main]
    others = [*rows(budget), BEST] if counts.strong > 0 else []
    return [*(judged(name, how) for name in OFFICIAL for how in compared), *(judged(name, "strong") for name in others)]


def jobs(path: str, budget: Budget = DEFAULT, device: str = "cpu", base: str | None = None) -> list[Job]:
    """All jobs, each as early as it can be: a model is judged when it is trained, so that the table grows row by row.

    Args:
        path: the folder of CIFAR-10.
        budget: how much of everything.
        device: where models are trained and judged, as torch names it.
        base: the name in the zoo of a base to stand on, for `ON_GIVEN` alone; None trains and judges everything.
    """
    where = Where(path, device)
    made: list[Job] = []
    for seed in range(budget.seeds):
        if base is None:
            waiting = judgings(where, seed, budget) + (further_judgings(where, budget) if seed == 0 else [])
            begun = trainings(where, seed, budget)
        else:
            waiting, begun = judgings_on(base, where, seed, budget), trainings_on(base, where, seed, budget)
        for training in begun:
            made.append(training)
            there = {job.name for job in made if job.seed == seed}
            for job in list(waiting):
                if there.issuperset(job.needs):
                    waiting.remove(job)
                    made.append(job)
                    there.add(job.name)
        made += waiting
    return made


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
    """A model as it is judged: a random defence predicts without noise, so that attacks need no average over draws.

    CARSO decodes the most likely latent, and AToP adds no noise.
    """
    model = model_of(job, root, name)
    if isinstance(model, StochasticDefence) and name not in AS_AUTHORS:
        # all samples are equal then: any aggregation gives their prediction
        return WithAggregation(model, deterministic=True).eval()
    return model


def judge(job: Job, folder: Path, root: Path) -> dict:
    """One protocol; beside the one that compares models, clean accuracy on many images."""
    counts: Judging = job.settings["judging"]
    name, protocol, images = job.settings["model"], job.settings["protocol"], images_of(job)
    if name == BEST:
        # with further seeds it is what its training took
        name = best(job, root) if job.seed == 0 else job.result(root, BEST)["model"]
    model, held = attacked(job, root, name), (images.x_test, images.y_test)
    torch.manual_seed(job.seed)
    found: dict = {"model": name}
    how: dict
    if protocol == main_protocol(name, counts):
        found["clean"] = clean_accuracy(model, images.x_test[: counts.clean], images.y_test)
    how = {"protocol": protocol}
    if protocol == AUTHORS:
        seen: dict = {"aggregation": "peel_reference"} if name == PEEL else {"target": "classifier"}
        attacks = [AttackSpec(PGD(loss=loss), **seen) for loss in ("ce", "dlr")]
        # each image stands for several samples and draws: fewer at once need less memory
        how = {"attacks": attacks, "steps": job.settings["budget"].carso_steps, "max_forward_batch": 250}
    return found | {protocol: _lowest(job, folder, model, name, held, getattr(counts, protocol), how)}


def judge_candidate(job: Job, folder: Path, root: Path) -> dict:
    """A way to get ahead of the base, on training images that were held out."""
    counts, name = job.settings["judging"], job.settings["model"]
    model, held = attacked(job, root, name), held_out(job, counts.held_out)
    torch.manual_seed(job.seed)
    return {
        "clean": clean_accuracy(model, *held),
        "tried": _lowest(job, folder, model, name, held, counts.candidates, {"protocol": counts.tried}),
    }


def _lowest(
    job: Job, folder: Path, model: nn.Module, name: str, held: tuple[torch.Tensor, torch.Tensor], count: int, how: dict
) -> dict:
    """Evaluate a model on the first images, keep the report, and return its lowest accuracy."""
    report = evaluate(
        model, held[0][:count], held[1][:count], eps=EPS, seed=job.seed, out=folder, name=name,
        dataset_name="cifar10", progress=False, **how,
    )  # fmt: skip
    report.save(folder, model)
    lowest = report.headlines[name]
    return {"share": lowest.accuracy, "images": lowest.n, "reliable": lowest.reliable}
