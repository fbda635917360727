"""``purify-fast plan``: the cost of a long run, before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from .._validation import Count
from .command import Command
from .evaluate import Evaluate
from .parsing import parse
from .training import OnClassifier, Training

if TYPE_CHECKING:
    from ..speed.run_cost import Forecast


@dataclass(frozen=True)
class Plan(Command):
    """Predict what a training or an evaluation will take: its time, its memory, and what it asks of the device.

    Its words go before those of the run: purify-fast plan --device h100 train carso --data mnist --epochs 20 ...

    Args:
        device: Where the run will be: on this machine's CPU, which is measured for about ten seconds, or on a GPU, for
            which the run is counted here and its time is modelled.
        gpus: How many GPUs share the run.
    """

    called: ClassVar[str] = "plan"

    device: Literal["cpu", "h100", "h200", "a100"] = "cpu"
    gpus: Count = 1
    run_planned: Annotated[Command | None, tyro.conf.Suppress] = None

    def run(self) -> None:
        command = self.run_planned
        if not isinstance(command, (Training, Evaluate)):
            raise ValueError("plan needs a command: purify-fast plan train ... or purify-fast plan evaluate ...")
        if self.device == "cpu" and self.gpus > 1:
            raise ValueError(f"--gpus above 1 needs --device h100, h200 or a100, got --gpus {self.gpus} for the CPU")
        gpu = None if self.device == "cpu" else self.device
        if isinstance(command, Training):
            planned = of_training(command, gpu, self.gpus)
        else:
            planned = of_evaluation(command, gpu, self.gpus)
        print(planned.to_text())


def read_plan(words: list[str], read: Callable[[list[str]], Command]) -> Plan:
    """The plan that the words behind ``plan`` describe.

    Args:
        words: the plan's own options, then the run's words.
        read: reads the command of a run.
    """
    begin = next((i for i, word in enumerate(words) if word in ("train", "evaluate")), len(words))
    plan = parse(Plan, words[:begin])
    assert isinstance(plan, Plan)
    return replace(plan, run_planned=read(words[begin:]) if begin < len(words) else None)


def of_training(command: Training, gpu: str | None, gpus: int) -> Forecast:
    """The forecast for a command that trains."""
    from ..training.probed_steps import forecast

    if isinstance(command, OnClassifier) and command.classifier is None:
        raise ValueError(
            "plan train ... needs --classifier FOLDER: train the classifier first, and plan that by itself"
        )
    # a run on a GPU is modelled by counting it on the CPU
    command = replace(command, device="cpu")
    images = command.load_data()
    return forecast(command.task(images), images.x_train, images.y_train, command.loop, gpu=gpu, gpus=gpus)


def of_evaluation(command: Evaluate, gpu: str | None, gpus: int) -> Forecast:
    """The forecast for a command that evaluates."""
    from ..evaluation.forecast import forecast

    images = replace(command, device="cpu").load_data()
    model, base = command.loaded(images)
    (eps, norm), (x, y, _) = command.ball(), command.chosen(images)
    return forecast(model, x, y, gpu=gpu, gpus=gpus, config=command.settings, eps=eps, norm=norm, base=base)
