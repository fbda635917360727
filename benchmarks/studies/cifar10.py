"""CIFAR-10 at L-inf 8/255: the three methods, as published and through the pipeline, beside fair single networks.

`cifar10_models` trains; here the models are judged by this package's own engine and put into one table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from purify_fast import data
from purify_fast._files import write_text
from purify_fast.attacks import PGD
from purify_fast.evaluation import AttackSpec, Report, Tradeoff, evaluate, merge, plot_tradeoff
from purify_fast.evaluation.tables import markdown_table, percent

from . import RESULT, Job
from .cifar10_ahead import CANDIDATES, MIXED
from .cifar10_models import (
    AFT,
    ARREST,
    ATOP,
    ATOP_PIPELINE,
    ATOP_ZERO,
    AWP,
    BASE,
    BEHIND,
    CARSO,
    CARSO_ARREST,
    CARSO_PIPELINE,
    CLASSIFIERS,
    EPS,
    FULL,
    GENERATOR,
    LARGE,
    NO_EMA,
    PEEL,
    QUICK,
    SHARES,
    STANDARD,
    TRADES,
    Budget,
    finetune,
    images_of,
    mix,
    model_of,
    search_arrest,
    search_name,
    share_name,
    train_atop,
    train_base,
    train_candidate,
    train_carso,
    train_standard,
)

__all__ = ["FULL", "QUICK", "Budget", "jobs", "write"]

DEFAULT = Budget()
#: The row that counts, and where a job keeps its reports.
WORST, PROTOCOLS = "worst", ("standard", "strong")
#: Models whose differences to another one are shown.
PAIRS = (
    (CARSO, BASE),
    (CARSO_PIPELINE, BASE),
    (CARSO_ARREST, ARREST),
    (ATOP, BASE),
    (ATOP_PIPELINE, BASE),
    (ATOP_ZERO, BASE),
    (ARREST, BASE),
    (AFT, BASE),
    (LARGE, BASE),
    (TRADES, BASE),
    (AWP, BASE),
    (NO_EMA, BASE),
    (MIXED, BASE),
    *((name, BASE) for name in CANDIDATES),
)


def jobs(path: str, seed: int = 0, budget: Budget = DEFAULT) -> list[Job]:
    """The trainings in the order in which they are needed, then the judging; each job uses every thread."""
    common = {"data": path, "budget": budget}

    def job(name: str, work: object, needs: tuple[str, ...] = (), **more: object) -> Job:
        return Job(name, seed, work, needs, {**common, **more}, threads=0)  # type: ignore[arg-type]

    pairs = [(weight, angle) for weight in budget.weights for angle in budget.angles]
    made = [
        job(BASE, train_base, how={}),
        job(STANDARD, train_standard),
        *(job(search_name(*pair), search_arrest, (STANDARD,), weight=pair[0], angle=pair[1]) for pair in pairs),
        job(ARREST, finetune, (STANDARD, *(search_name(*pair) for pair in pairs))),
        job(AFT, finetune, (STANDARD,)),
        job(CARSO, train_carso, (BASE,)),
        job(CARSO_PIPELINE, train_carso, (BASE, CARSO)),
        job(CARSO_ARREST, train_carso, (BASE, ARREST, CARSO)),
        job(GENERATOR, train_atop, (BASE,)),
        job(ATOP, train_atop, (BASE, GENERATOR)),
        job(ATOP_PIPELINE, train_atop, (BASE, GENERATOR)),
        job(ATOP_ZERO, train_atop, (BASE, GENERATOR)),
        job(LARGE, train_base, how={"large": True}),
        job(TRADES, train_base, how={"trades": True}),
        job(AWP, train_base, how={"awp": True}),
        job(NO_EMA, train_base, how={"ema": False}),
        *(job(share_name(share), train_base, how={"share": share}) for share in SHARES),
        *(job(name, train_candidate, (BASE, CARSO)) for name in CANDIDATES),
        job(MIXED, mix, (STANDARD, BASE)),
    ]
    return made + [job(judged_name(name), judge, (CARSO if name == PEEL else name,), model=name) for name in rows()]


def rows() -> list[str]:
    """The models of the table, in its order."""
    return [*CLASSIFIERS, MIXED, *(share_name(share) for share in SHARES), PEEL, *BEHIND]


def judged_name(name: str) -> str:
    """The job that judges a model."""
    return f"{name} judged"


@torch.no_grad()
def clean_accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of images that are classified correctly.

    Args:
        model: images to logits.
        x: uint8 ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.
    """
    right = sum(
        int((model(data.to_float(a)).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True)
    )
    return right / len(y)


def judge(job: Job, folder: Path, root: Path) -> dict:
    """Clean accuracy on many images, then the protocols; CARSO's published output only through itself."""
    budget: Budget = job.settings["budget"]
    name, images = job.settings["model"], images_of(job)
    model = model_of(job, root, name)
    torch.manual_seed(job.seed)
    clean = budget.clean_images
    found: dict = {"clean": clean_accuracy(model, images.x_test[:clean], images.y_test[:clean])}
    through = [AttackSpec(PGD(loss=loss), aggregation="peel_reference") for loss in ("ce", "dlr")]
    for protocol, count in zip(PROTOCOLS, (budget.images, budget.strong_images), strict=True):
        if name == PEEL and protocol == "strong":
            continue
        how = {"attacks": through, "steps": 2 * budget.carso_steps} if name == PEEL else {"protocol": protocol}
        report = evaluate(
            model, images.x_test[:count], images.y_test[:count], eps=EPS, seed=job.seed, out=folder / protocol,
            name=name, dataset_name=images.name, progress=False, **how,
        )  # fmt: skip
        report.save(folder / protocol, model)
        lowest = report.headlines[name]
        found[protocol] = {"share": lowest.accuracy, "images": lowest.n, "reliable": lowest.reliable}
    return found


def kept(job: Job, root: Path, name: str, protocol: str) -> Report:
    """The report that judging a model left."""
    path = job.folder(root, judged_name(name)) / protocol / "report.json"
    return Report.from_json(path.read_text())


def table(root: Path, names: Sequence[str], seed: int) -> list[str]:
    """One line for each model: accuracies, trade-offs, costs."""
    job, body = Job("report", seed, judge), []
    for name in names:
        facts = json.loads((job.folder(root, CARSO if name == PEEL else name) / RESULT).read_text())
        judged = json.loads((job.folder(root, judged_name(name)) / RESULT).read_text())
        robust = judged["standard"]
        both = Tradeoff(100 * judged["clean"], 100 * robust["share"])
        lowest = kept(job, root, name, "standard").headlines[name]
        strong = judged.get("strong")
        body.append(
            [
                name,
                f"{100 * judged['clean']:.1f}",
                percent(lowest) + ("" if robust["reliable"] else " **unreliable**"),
                "-" if strong is None else f"{100 * strong['share']:.1f} ({strong['images']})",
                f"{both.sum:.1f}",
                f"{both.nrr:.1f}",
                f"{facts['parameters'] / 1e6:.2f}",
                f"{facts['inference_gflop']:.3f}",
                f"{facts['training_gflop']:.2f}",
                f"{facts['minutes'] / 60:.2f}",
            ]
        )
    head = ["model", "clean", "`standard`", "`strong`", "SUM", "NRR", "million parameters"]
    return markdown_table([*head, "GFLOP a prediction", "GFLOP a training image", "hours of training"], body)


def write(root: Path, folder: Path, seed: int = 0, budget: Budget = DEFAULT) -> Path:
    """``cifar10.md`` and its reports and pictures in ``folder``."""
    job, names = Job("report", seed, judge), rows()
    found = {name: kept(job, root, name, "standard") for name in names}
    points = {}
    for name in names:
        clean = json.loads((job.folder(root, judged_name(name)) / RESULT).read_text())["clean"]
        robust = found[name].headlines[name]
        error = 100 * (clean * (1 - clean) / budget.clean_images) ** 0.5
        points[name] = (100 * clean, 100 * robust.accuracy, error, 100 * robust.standard_error)
    facts = json.loads((job.folder(root, ARREST) / RESULT).read_text())
    lines = [
        f"CIFAR-10, L-inf 8/255, seed {seed}. A PreActResNet-18 of width {budget.width}. Clean accuracy is on "
        f"{budget.clean_images:,} test images, `standard` on the first {budget.images:,}, `strong` on the first "
        f"{budget.strong_images:,}; all in percent, with binomial standard errors. Epochs: {budget.standard_epochs} on "
        f"clean images, {budget.base_epochs} of PGD-{budget.steps} for each base, {budget.arrest_epochs} of ARREST and "
        f"AFT, {budget.published_epochs} of CARSO and AToP as published, {budget.pipeline_epochs} through the "
        f"pipeline. On held-out training images lambda {facts['weight']:g} and phi {facts['angle']:g} were chosen for "
        "ARREST.",
        "",
        *table(root, names, seed),
        "",
        *(f"- {name} minus {other}, `standard`: {found[name].paired(found[other])}." for name, other in PAIRS),
    ]
    whole = merge(found.values())
    whole.save(folder / "cifar10")
    curve = [points[name][:2] for name in (STANDARD, *(share_name(share) for share in SHARES), BASE)]
    shown = {name: value for name, value in points.items() if name not in (PEEL, GENERATOR)}
    plot_tradeoff(
        folder / "cifar10" / "tradeoff.png", shown, sorted(curve), reference_name="trained at shares of eps",
        title="CIFAR-10, L-inf 8/255",
    )  # fmt: skip
    write_text(folder / "cifar10.md", "\n".join(lines) + "\n")
    return folder / "cifar10.md"
