"""Listeners to a training: a progress bar, and `Callback`, the base class for your own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from .task import Task

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class TrainingState:
    """The state of a training, for callbacks.

    Args:
        task: the training's task.
        step: steps taken so far.
        total_steps: steps of the whole run.
        epoch: the epoch that is running or has just ended, from 0.
        epochs: epochs of the whole run.
        images: number of images of the step (in `on_step`) or of the epoch (in `on_epoch`), of all processes together.
        metrics: in `on_step`, the step's loss and metrics as tensors, which the device may still be computing; in
            `on_epoch` and `on_end`, the means over the epoch as numbers, and those of a validation.
        learning_rate: learning rate of the last step.
        images_per_second: speed since the start of the epoch, or since the run was resumed within it; 0 in `on_step`.
    """

    task: Task
    step: int
    total_steps: int
    epoch: int
    epochs: int
    images: int
    metrics: Mapping[str, Any]
    learning_rate: float
    images_per_second: float = 0.0


class Callback(Protocol):
    """The base class of listeners to a training. A subclass defines methods, which only the first process calls."""

    def on_step(self, state: TrainingState) -> None:
        """Run after every step. Reading the value of a metric waits for the device."""
        return None

    def on_epoch(self, state: TrainingState) -> None:
        """Run after every epoch and its validation, before the checkpoint is written."""
        return None

    def on_end(self, state: TrainingState) -> None:
        """Run at the end, when the model holds the training's result."""
        return None


class ProgressBar(Callback):
    """Shows a progress bar on stderr, with the last epoch's metrics, and says where a resumed run continues."""

    def __init__(self, title: str, run: Run, shown: bool):
        images = run.source.batch_size
        if shown and 0 < run.step < run.total:
            print(f"{title}: continues at step {run.step} (epoch {run.epoch})", file=sys.stderr)
        elif shown and run.begins_anew:
            print(f"{title}: begins anew, because the earlier run ended before its first checkpoint", file=sys.stderr)
        self.bar = tqdm(
            total=run.total,
            initial=run.step,
            unit="img" if images else "step",
            unit_scale=images or False,
            desc=title,
            smoothing=0.05,
            disable=not shown,
            # A log file should get a line only every 10 seconds.
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def on_step(self, state: TrainingState) -> None:
        self.bar.update()

    def on_epoch(self, state: TrainingState) -> None:
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in state.metrics.items()}, refresh=False)


def summary(metrics: Mapping[str, float]) -> str:
    """Return one line with the metrics of a training's last epoch, which `fit` returned."""
    shown = [
        f"{name.replace('_', ' ')} " + (f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}")
        for name, value in metrics.items()
    ]
    return f"last epoch: {', '.join(shown)} (on training images)" if shown else "nothing was trained"
