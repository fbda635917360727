"""``purify-fast plan``: predict the time and the memory of a run before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from .command import Command
from .evaluate import Evaluate
from .parsing import parse
from .training import OnClassifier, Training

if TYPE_CHECKING:
    from ..speed.run_cost import Forecast


@dataclass(frozen=True)
class Plan(Command):
    """Predict the time and the memory of a training or an evaluation, from a short trial.

    The command of the run comes after plan: purify-fast plan train classifier --data mnist ...
    """

    called: ClassVar[str] = "plan"

    config: Annotated[Path | None, tyro.conf.Suppress] = None
    run_planned: Annotated[Command | None, tyro.conf.Suppress] = None

    def run(self) -> None:
        command = self.run_planned
        if isinstance(command, Training):
            print(of_training(command).to_text())
        elif isinstance(command, Evaluate):
            print(of_evaluation(command).to_text())
        else:
            raise ValueError("plan needs a command: purify-fast plan train ... or purify-fast plan evaluate ...")


def read_plan(words: list[str], read: Callable[[list[str]], Command]) -> Plan:
    """Make a plan from the words after ``plan``."""
    begin = next((i for i, word in enumerate(words) if word in ("train", "evaluate")), len(words))
    return replace(parse(Plan, words[:begin]), run_planned=read(words[begin:]) if begin < len(words) else None)


def of_training(command: Training) -> Forecast:
    """Predict the cost of a command that trains, with the start of this process, which that of the run will equal."""
    from ..training.probed_steps import forecast

    if isinstance(command, OnClassifier) and command.classifier is None:
        raise ValueError(
            "plan train ... needs --classifier FOLDER: train the classifier first, and plan its training separately"
        )
    images = command.load_data()
    task, start = command.task(images), time.process_time()
    planned = forecast(task, images.x_train, images.y_train, command.loop)
    return replace(planned, seconds=start + planned.seconds)


def of_evaluation(command: Evaluate) -> Forecast:
    """Predict the cost of a command that evaluates, with the start of this process, as `of_training` does."""
    from ..evaluation.forecast import forecast
    from ..speed.precision import float32_products

    images = command.load_data()
    model, base = command.prepared(images)
    (eps, norm), (x, y, _) = command.ball(), command.chosen(images)
    start = time.process_time()
    with float32_products(tf32=command.precision == "tf32"):
        planned = forecast(model, x, y, config=command.settings, eps=eps, norm=norm, base=base)
    return replace(planned, seconds=start + planned.seconds)
