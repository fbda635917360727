"""``purify-fast plan``: predict the time and the memory of a run before it begins."""

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
    """Predict the time, the memory and the operations of a training or an evaluation.

    The options of plan come before the command of the run: purify-fast plan --device h100 train carso --data mnist ...

    Args:
        device: Device of the run. cpu: the CPU of this machine, which is measured for about ten seconds. A GPU: the
            operations of the run are counted on this machine, and its time is computed from a model of the GPU.
        gpus: Number of GPUs that share the run.
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
    """Make a plan from the words after ``plan``.

    Args:
        words: the options of the plan, then the command of the run.
        read: function that makes a command from its words.
    """
    begin = next((i for i, word in enumerate(words) if word in ("train", "evaluate")), len(words))
    return replace(parse(Plan, words[:begin]), run_planned=read(words[begin:]) if begin < len(words) else None)


def of_training(command: Training, gpu: str | None, gpus: int) -> Forecast:
    """Predict the cost of a command that trains."""
    from ..training.probed_steps import forecast

    if isinstance(command, OnClassifier) and command.classifier is None:
        raise ValueError(
            "plan train ... needs --classifier FOLDER: train the classifier first; that training has its own plan"
        )
    # The operations of a run on a GPU are counted on the CPU.
    command = replace(command, device="cpu")
    images = command.load_data()
    return forecast(command.task(images), images.x_train, images.y_train, command.loop, gpu=gpu, gpus=gpus)


def of_evaluation(command: Evaluate, gpu: str | None, gpus: int) -> Forecast:
    """Predict the cost of a command that evaluates."""
    from ..evaluation.forecast import forecast

    images = replace(command, device="cpu").load_data()
    model, base = command.loaded(images)
    (eps, norm), (x, y, _) = command.ball(), command.chosen(images)
    return forecast(model, x, y, gpu=gpu, gpus=gpus, config=command.settings, eps=eps, norm=norm, base=base)
