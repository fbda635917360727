"""Predicts the time and the memory of a training from a few of its steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..speed.memory import peak_so_far
from ..speed.run_cost import Forecast
from .checkpoint import save_checkpoint
from .config import FitConfig
from .loop import choose_threads, step_settings, train_step
from .run import Run
from .sources import HeldOut, Images, make_sources, step_seed
from .task import Batch, Task


def forecast(
    task: Task,
    x: Images,
    y: torch.Tensor | None,
    config: FitConfig,
    *,
    validation: HeldOut | None = None,
    seconds: float = 10.0,
) -> Forecast:
    """Predict the cost of `purify_fast.training.fit` with the same arguments, on the model's device.

    This function takes steps with the task, which change the task's weights, so make a new task for `fit`. From the
    step in which a delayed term of the loss begins, each step takes longer. So steps are measured at the start of the
    run, and again for each step in which a term begins.

    Args:
        task: the training.
        x: the images, as in `fit`.
        y: the labels, as in `fit`.
        config: length and settings of the training.
        validation: the held-out images, as in `fit`.
        seconds: approximate time for the measurement.

    Raises:
        ValueError: the images cannot be trained on, as in `fit`.
    """
    source, held_out = make_sources(task, x, y, config, validation)
    run, device = Run(task, config, source, held_out), source.device
    begins = sorted({0, *(step for step in run.terms.values() if 0 < step < run.total)})
    whole = 0.0
    with step_settings(task, config, device):
        choose_threads(run, next(_steps(run, 0)))
        for begin, end in zip(begins, [*begins[1:], run.total], strict=True):
            steps = _steps(run, begin)
            median = _timed(lambda steps=steps: train_step(task, next(steps)), device, seconds / len(begins))  # type: ignore[misc]
            whole += (end - begin) * median
        if held_out is not None:
            # the number of validations is rounded up, because the last epoch always ends with a validation
            passes = -(-config.epochs // config.validation_every)
            batches = [*held_out.epoch(0, 0)]
            with run.finished():
                whole += passes * len(batches) * _timed(lambda: run.measure(batches[0]), device, 0.0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), run.state())
    whole += config.epochs * (time.perf_counter() - began)
    what = f"{run.total:,} steps of {source.batch_size or 'given'} images on {device.type}"
    return Forecast(what, whole, peak_so_far(device))


def _steps(run: Run, begin: int) -> Iterator[Batch]:
    """Yield the batches of a run from step ``begin`` to the end of its epoch, again and again."""
    while True:
        for step, raw in enumerate(run.source.epoch(begin // run.steps, begin % run.steps), begin):
            yield run.batch(raw, step, step_seed(run.config.seed, step))


def _timed(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Call once without timing, then time at least two calls, for about ``seconds``, and return the median."""

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    times, began = list[float](), finished()
    while len(times) < 2 or finished() - began < seconds:
        before = finished()
        call()
        times.append(finished() - before)
    return statistics.median(times)
