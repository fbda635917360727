"""A network of each method, trained for a short time, and attacked beside the zoo's model of the same method.

The trainings start from the zoo's classifiers and from new purifiers. All models are attacked by the protocol ``fast``
within the same radius, on the same images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from purify_fast import zoo
from purify_fast.evaluation import EvaluateConfig, Report, evaluate
from purify_fast.methods.arrest import ArrestTask
from purify_fast.methods.atop import Atop, AtopTask
from purify_fast.methods.atop.generators import SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.diffusion import DiffusionPurifier
from purify_fast.models import UNet
from purify_fast.protocols import Classifier
from purify_fast.training import Callback, FitConfig, Task, TrainingAttack, TrainingState, fit

from ..your_diffusion_loop import PATCH, WIDTH, Denoising
from .methods import ARREST_CONFIG, PRETRAINING, THROUGH_ATOP, THROUGH_CARSO, save
from .setting import EPS, LAYERS, SIZES, digits
from .summary import percent, signs, template
from .workers import two_workers

#: Radius of the attacks, and the number of held-out images that are attacked.
RADIUS, IMAGES = 0.1, 40
STANDARD, BASE = "digits-standard", "digits-pgd-at"
#: Runs one training: a task, the number of epochs, and the batch size.
Stage = Callable[[Task, int, int], None]


def _carso(train: Stage) -> Classifier:
    defence = Carso(zoo.load(BASE), LAYERS, digits().image_shape, **SIZES)
    train(CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=EPS, steps=7))), 6, 64)
    train(CarsoTask(defence, THROUGH_CARSO), 10, 128)
    return defence


def _atop(train: Stage) -> Classifier:
    defence = Atop(zoo.load(STANDARD), SmallGenerator(1), digits().image_shape)
    train(AtopTask(defence, PRETRAINING), 10, 64)
    # The learning rate of a longer training loses what the first training has learned.
    attack = TrainingAttack(eps=RADIUS, steps=4)
    train(AtopTask(defence, replace(THROUGH_ATOP, learning_rate=1e-3, attack=attack)), 5, 64)
    return defence


def _arrest(train: Stage) -> Classifier:
    task = ArrestTask(zoo.load(STANDARD), ARREST_CONFIG, digits().image_shape)
    train(task, 20, 64)
    return task.result


def _diffusion(train: Stage) -> Classifier:
    shape, process = digits().image_shape, zoo.load("digits-diffpure-at").process
    task = Denoising(UNet(shape[0], WIDTH, patch=PATCH))
    train(task, 30, 64)
    return DiffusionPurifier(task.result, zoo.load(BASE), shape, process, last_time=task.last_time)


class Method(NamedTuple):
    """A method: the function that trains a network, the zoo's model, and the zoo's classifier that both start from."""

    train: Callable[[Stage], Classifier]
    card: str
    classifier: str


METHODS = {
    # The attacks on diffusion purifiers take longest, so they begin first.
    "diffusion": Method(_diffusion, "digits-diffpure-at", BASE),
    "CARSO": Method(_carso, "digits-carso-pipeline", BASE),
    "AToP": Method(_atop, "digits-atop-pipeline", STANDARD),
    "ARREST": Method(_arrest, "digits-arrest", STANDARD),
}


class Says(Callback):
    """Prints a line after every tenth of a training."""

    def __init__(self, title: str):
        self.title = title

    def on_epoch(self, state: TrainingState) -> None:
        if (state.epoch + 1) % max(1, state.epochs // 10) == 0:
            metrics = ", ".join(f"{name} {value:.3g}" for name, value in state.metrics.items())
            print(f"{self.title}, epoch {state.epoch + 1} of {state.epochs}: {metrics}", flush=True)


def run(out: Path, seed: int) -> list[Report]:
    """Train and attack the models, and write ``report.md``, and for each model a page and JSON in its folder.

    Args:
        out: folder of the results. Parts that an earlier run has finished are not computed again.
        seed: seed of all random draws.

    Returns:
        The reports of all models.
    """
    print(f"digits: {len(digits().x_train)} training images, {IMAGES} attacked held-out images, L-inf eps {RADIUS}")
    with two_workers() as pool:
        alone = {card: pool.submit(_of_the_zoo, out, card, f"{card}, no defence", seed) for card in (STANDARD, BASE)}
        ours = {method: pool.submit(_trained, out, method, seed) for method in METHODS}
        zoos = {name: pool.submit(_of_the_zoo, out, method.card, name, seed) for name, method in METHODS.items()}
        jobs = (*alone.values(), *ours.values(), *zoos.values())
        for number, job in enumerate(as_completed(jobs), 1):
            print(f"attacked ({number} of {len(jobs)}): {job.result().model}", flush=True)
    shown = [("-", job.result()) for job in alone.values()]
    for name, method in METHODS.items():
        shown += [(method.classifier, ours[name].result()), (method.classifier, zoos[name].result())]
    rows = [(classifier, *_row(each)) for classifier, each in shown]
    values = {"rows": rows, "radius": RADIUS, "images": IMAGES, "out": out.as_posix()}
    page = template("beside_zoo.md.jinja").render(values)
    (out / "report.md").write_text(page)
    print(f"\n{page}")
    return [report for _, report in shown]


def _row(report: Report) -> tuple[str, str, str, str, str]:
    """Cells about a model: name, clean accuracy, accuracy under attack, that of a single prediction, and signs."""
    lowest = report.headline
    single = f"{100 * lowest.mean:.1f} ± {100 * lowest.mean_error:.1f}"
    return report.model, percent(report.row("clean")), percent(lowest), single, signs(report)


def _trained(out: Path, method: str, seed: int) -> Report:
    """Train a network by a method, and attack it."""
    seconds: list[float] = []

    def stage(task: Task, epochs: int, batch_size: int) -> None:
        title = f"{method}, training {len(seconds) + 1}"
        images, folder = digits(), out / method / f"training_{len(seconds) + 1}"
        loop = FitConfig(epochs, batch_size, seed)
        fit(task, images.x_train, images.y_train, loop, folder, callbacks=[Says(title)], progress=False)
        seconds.append(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["seconds"])

    torch.manual_seed(seed)
    model = METHODS[method].train(stage)
    save(model, out / method)
    return _attacked(out / method, model, f"{method}, trained here for {sum(seconds):.0f} s", seed)


def _of_the_zoo(out: Path, card: str, title: str, seed: int) -> Report:
    return _attacked(out / card, zoo.load(card), f"{title}, from the zoo", seed)


def _attacked(folder: Path, model: Classifier, name: str, seed: int) -> Report:
    """Attack a model by the protocol ``fast``."""
    x, y = digits().x_test[:IMAGES], digits().y_test[:IMAGES]
    config = EvaluateConfig("fast", seed=seed, dataset_name=digits().name)
    report = evaluate(model, x, y, eps=RADIUS, out=folder, name=name, progress=False, config=config)
    report.save(folder / "report", model)
    return report
