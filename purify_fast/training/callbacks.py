"""The listeners of a training: logs, a progress bar, or anything with the methods of `Callback`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from .task import Task

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .run import Run


@dataclass(frozen=True)
class TrainingState:
    """The state of a training, as its callbacks see it.

    Args:
        task: the training's task.
        step: steps taken so far.
        total_steps: steps of the whole run.
        epoch: the epoch that is running or has just ended, from 0.
        epochs: epochs of the whole run.
        images: images of the step, or of the epoch, of all processes together.
        metrics: after a step its loss and metrics as tensors, whose values are known when the device gets there; after
            an epoch and at the end the means over the epoch as numbers, with those of a validation.
        learning_rate: learning rate of the last step.
        images_per_second: speed of the epoch, since its start or since it was resumed; 0 after a step.
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
    """Listens to a training; subclasses define the methods they need. Only the first of several processes calls it."""

    def on_step(self, state: TrainingState) -> None:
        """Called after every step; reading a metric's value waits for the device.

        Args:
            state: where the training is.
        """
        return None

    def on_epoch(self, state: TrainingState) -> None:
        """Called after every epoch and its validation, before the checkpoint is written.

        Args:
            state: where the training is.
        """
        return None

    def on_end(self, state: TrainingState) -> None:
        """Called when the model holds the training's result.

        Args:
            state: where the training is, with the last epoch's metrics.
        """
        return None


class TensorBoardLog(Callback):
    """Event files for TensorBoard: every epoch's metrics, learning rate and speed, over the steps.

    Args:
        folder: where the event files go.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path):
        # tensorboard is an optional package, of the extra "log"
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._make = Path(folder), SummaryWriter
        self._writer: SummaryWriter | None = None

    def on_epoch(self, state: TrainingState) -> None:
        if self._writer is None:
            # hide what an earlier, killed run wrote about this epoch and later ones
            self._writer = self._make(str(self.folder), purge_step=state.step)
        speed = {"learning_rate": state.learning_rate, "images_per_second": state.images_per_second}
        for name, value in {**state.metrics, **speed}.items():
            self._writer.add_scalar(name, value, state.step)
        self._writer.flush()

    def on_end(self, state: TrainingState) -> None:
        if self._writer is not None:
            self._writer.close()


class ProgressBar(Callback):
    """A bar on stderr, with the last epoch's metrics."""

    def __init__(self, title: str, run: Run, shown: bool):
        images = run.source.batch_size
        self.bar = tqdm(
            total=run.total,
            initial=run.step,
            unit="img" if images else "step",
            unit_scale=images or False,
            desc=title,
            smoothing=0.05,
            disable=not shown,
            # a log file wants a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def on_step(self, state: TrainingState) -> None:
        self.bar.update()

    def on_epoch(self, state: TrainingState) -> None:
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in state.metrics.items()}, refresh=False)


def summary(metrics: Mapping[str, float]) -> str:
    """Summarize a training's last epoch in a line.

    Args:
        metrics: the value that `fit` returned.
    """
    shown = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()]
    return f"last epoch: {', '.join(shown)}" if shown else "nothing was trained"
