"""Predicts the cost of a training: measures a few steps, and extrapolates their cost to the whole run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from .._memory import peak_resident_memory
from ..speed.counting import Cost, counted
from ..speed.memory import peak_memory
from ..speed.run_cost import Forecast
from .config import FitConfig
from .loop import train_step
from .run import Run
from .sources import HeldOut, Images, make_sources, step_seed
from .task import Batch, Task

#: The operations of a step are counted at these two batch sizes, and extrapolated linearly to the run's batch size.
COUNTED = (8, 16)


def forecast(
    task: Task,
    x: Images,
    y: torch.Tensor | None,
    config: FitConfig,
    *,
    validation: HeldOut | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    seconds: float = 10.0,
) -> Forecast:
    """Predict the cost of `purify_fast.training.fit` with the same arguments.

    This takes steps with the task and changes its weights, so make a new task for `fit`. From the step in which a
    delayed term of the loss begins, each step takes longer. So steps are measured at the start of the run, and again
    for each step in which a term begins.

    Args:
        task: the training.
        x: the images, as in `fit`.
        y: the labels, as in `fit`.
        config: length and settings of the training.
        validation: the held-out images, as in `fit`.
        gpu: name of a GPU in `purify_fast.speed.counting.GPUS`: the operations of a step are counted, and a model of
            this GPU predicts their time. None: steps are timed on this CPU.
        gpus: number of GPUs that share each batch.
        seconds: approximate time for the measurement on a CPU.

    Raises:
        ValueError: the images cannot be trained on, as in `fit`.
    """
    source, held_out = make_sources(task, x, y, config, validation)
    run = Run(task, config, source, held_out)
    begins = sorted({0, *(step for step in run.terms.values() if 0 < step < run.total)})
    cost, time_taken, memory = Cost(0, 0, 0), 0.0, 0.0
    for begin, end in zip(begins, [*begins[1:], run.total], strict=True):
        steps = _steps(run, begin)
        step, needed = _count(task, next(steps))
        cost = cost.plus(step.times(end - begin))
        memory = max(memory, needed)
        if gpu is None:
            one_step = partial(_take, task, steps)
            time_taken += (end - begin) * _timed(one_step, seconds / len(begins))
    if held_out is not None:
        # the last epoch always ends with a validation
        passes = -(-config.epochs // config.validation_every)
        batches = [*held_out.epoch(0, 0)]
        with run.finished():
            cost = cost.plus(counted(lambda: run.measure(batches[0])).times(passes * len(batches)))
            if gpu is None:
                time_taken += passes * len(batches) * _timed(lambda: run.measure(batches[0]), 0.0)
    kind = "this CPU" if gpu is None else f"{gpus} {gpu}"
    what = f"{run.total:,} steps of {run.source.batch_size or 'given'} images on {kind}"
    if gpu is None:
        return Forecast(what, cost, peak_resident_memory(), time_taken)
    precision = "bfloat16" if getattr(getattr(task, "config", None), "precision", "") == "bfloat16" else "tf32"
    return Forecast(what, cost, memory, gpu=gpu, gpus=gpus, precision=precision)


def _steps(run: Run, begin: int) -> Iterator[Batch]:
    """Yield the batches of a run from step ``begin`` to the end of its epoch, again and again."""
    while True:
        for step, raw in enumerate(run.source.epoch(begin // run.steps, begin % run.steps), begin):
            yield run.batch(raw, step, step_seed(run.config.seed, step))


def _count(task: Task, batch: Batch) -> tuple[Cost, float]:
    """Return the cost of a step and the bytes of tensors at its peak, extrapolated linearly from two small batches."""
    costs, peaks, sizes = [], [], [min(size, len(batch.x)) for size in COUNTED]
    # the first step includes work that is done only once, so it is not counted
    train_step(task, _part(batch, sizes[0]))
    for size in sizes:
        step = partial(train_step, task, _part(batch, size))
        costs.append(counted(step))
        peaks.append(peak_memory(step, batch.x.device))
    share = (len(batch.x) - sizes[0]) / max(1, sizes[1] - sizes[0])
    tensors = [*task.model.parameters(), *task.model.buffers()]
    for optimizer in task.optimizers.values():
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = sum(tensor.nbytes for tensor in tensors)
    return costs[0].line(costs[1], share), kept + peaks[0] + (peaks[1] - peaks[0]) * share


def _take(task: Task, steps: Iterator[Batch]) -> None:
    train_step(task, next(steps))


def _part(batch: Batch, size: int) -> Batch:
    return replace(batch, x=batch.x[:size], y=batch.y[:size], sample_ids=batch.sample_ids[:size], bank=None)


def _timed(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of at least two calls, which run for ``seconds``. One call before them is not timed."""
    call()
    times, began = list[float](), time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)
