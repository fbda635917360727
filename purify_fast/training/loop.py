"""The training loop the methods share: resumable at any kill, logged, with throughput.

Every step is a function of (seed, step) and of the state in the checkpoint: the order of the images, the attack's
starts and torch's global generator are all seeded per step. So a run that was killed and resumed ends with the same
weights, to the bit on the same CPU, as one that was not.

Several processes (`purify_fast.training.distributed`) share each batch, and end with the weights of one up to floating
point. What a step exchanges: gradients and metrics, in one mean after the backward pass, and BatchNorm's statistics.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import ops
from .._process import Stop, processes, stop_on_sigterm
from ..models.layers import BatchNorm1d, BatchNorm2d
from ..speed.precision import float32_products, whole_float32_by_default
from .callbacks import Callback, JsonlLog, ProgressBar, TrainingState
from .config import FitConfig
from .distributed import from_first
from .divergence import Diverged, LossWatch
from .epoch import batch_of, set_learning_rate, train_step
from .lost_processes import named_when_lost, report_step, signs_of_life
from .on_device import on_device
from .run import Checkpointer, Run
from .sources import HeldOut, Images, Source, held_out_source, step_seed, training_source
from .task import Task
from .validation import Validation

logger = logging.getLogger("purify_fast")


@signs_of_life()
@whole_float32_by_default()
def fit(
    task: Task,
    x: Images,
    y: Tensor | None,
    config: FitConfig,
    folder: str | Path | None = None,
    title: str = "train",
    progress: bool = True,
    *,
    callbacks: Sequence[Callback] = (),
    validation: HeldOut | None = None,
) -> dict[str, float]:
    """Train ``task``, resuming from ``folder`` if it holds a checkpoint of the same run.

    In a process group of several (the command line makes it under torchrun, elsewhere
    ``torch.distributed.init_process_group`` does) every process calls this alike. They start from the weights of the
    first, which alone reads and writes the folder; a run may be resumed by another number of them. The weights are
    those of one process up to floating point, but where a model draws otherwise than by `purify_fast` (torch's dropout:
    the same masks in every process), and where the published training's attacks cannot be shared out evenly
    (`purify_fast.methods.carso.losses.balanced_batch`).

    Args:
        task: the training: model, optimizers, step.
        x: the images to train on, in one of three forms. **Images**: uint8 ``[N, C, H, W]`` on the device to train on;
            streamed from a file they give the same weights to the bit, and either form resumes the other's run; every
            process gives all of them. **A loader**: a DataLoader or another iterable with a length, of (images, labels)
            or (images, labels, indices), images float in [0, 1] or uint8; every process gives its own share. Its order
            is taken as it comes, so that a run is resumed at the end of its last whole epoch; it is the same order
            again if it is drawn from torch's global generator, as a shuffling DataLoader's is. **A function** of the
            epoch that returns such an iterable, in the same order whenever it is called for the same epoch: a run is
            resumed at any step, and the batches before it are read again.
        y: labels, int64 ``[N]`` beside the images; None with a loader or a function.
        config: how long and how. With a loader or a function its batch_size has no effect.
        folder: for ``checkpoint.safetensors``, ``log.jsonl`` and ``best.safetensors``; None keeps nothing.
        title: of the progress bar.
        progress: whether there is a progress bar.
        callbacks: what else listens to the training, see `Callback`.
        validation: held-out images, in place of the config's validation_share: (images, labels), or as ``x``, all of
            them in every process.

    Returns:
        The last epoch's mean metrics, with those of its validation.

    Raises:
        TypeError: a task that is no `Task`, or images in no form that can be trained on.
        ValueError: images, labels or a loader that cannot be trained on, or that the model does not take; fewer images
            than a batch; a keep_best that the task does not measure; a checkpoint of another run; with several
            processes, a batch they cannot share evenly, other data or settings than the first one's, or a model in
            training mode with a BatchNorm that is not synchronized.
        FloatingPointError: the loss or the weights are not finite; the last checkpoint stays.
        FolderInUse: another run writes into the folder.
        ProcessLost: another process died or does not answer. Where this one cannot raise it, because it waits in a
            driver, it ends with status 1.
        SystemExit: SIGTERM asked for it; a checkpoint of the last step is written first.
    """
    world = processes()[1]
    if not isinstance(task, Task):
        raise TypeError(f"task must be a purify_fast.training.Task, got {type(task).__name__}")
    folder = None if folder is None else Path(folder)
    if folder is None and config.on_nan == "back_off":
        raise ValueError("on_nan 'back_off' goes back to a checkpoint: give a folder to keep it in")
    source = training_source(task, x, y, config, folder is not None)
    held = held_out_source(task, x, y, config, validation)
    run = Run(task, config, source, None if validation is None or held is None else held.description)
    if world > 1:
        task.model.train()
        _check_batchnorm(task.model)
    checkpoints = Checkpointer(run, folder, source.reproducible)
    validate = None if held is None else Validation(run, held, folder)
    with checkpoints.locked(), stop_on_sigterm() as stop:
        checkpoints.resume(source.device)
        rounded = float32_products(tf32=True) if task.tf32 else contextlib.nullcontext()
        with rounded, _served_as_begun(run, source.device):
            return _run(
                run, source, checkpoints, validate, callbacks=callbacks, title=title, progress=progress, stop=stop
            )


@contextlib.contextmanager
def _served_as_begun(run: Run, device: torch.device) -> Iterator[None]:
    """Within the block the same kernels serve as when the run began, in all of its processes as in the first."""
    now = from_first(lambda: ops.kernel_choices(device))
    run.served, pinned, changes = ops.resume_choices(run.served, now)
    if processes()[0] == 0:
        if pinned:
            logger.warning(
                "this run goes on with the kernels that it began with; today others would serve %s: begin a run in "
                "another folder for those",
                ", ".join(pinned),
            )
        for sentence in changes:
            warnings.warn(f"this run does not go on to the bit: {sentence}", RuntimeWarning, stacklevel=3)
    with ops.pin_kernels(run.served):
        yield


def _run(
    run: Run,
    source: Source,
    checkpoints: Checkpointer,
    validate: Validation | None,
    *,
    callbacks: Sequence[Callback],
    title: str,
    progress: bool,
    stop: Stop,
) -> dict[str, float]:
    """What is left of a run, and what it leaves in the model."""
    task, config, folder, rank = run.task, run.config, checkpoints.folder, processes()[0]
    log = [] if folder is None or rank else [JsonlLog(folder / "log.jsonl", run.step, config.on_full)]
    size, unit = (1, "step") if source.batch_size is None else (source.batch_size, "img")
    bar = ProgressBar(title, run.total * size, run.step * size, unit, progress and rank == 0)
    listeners = [] if rank else [*log, bar, *callbacks]
    devices = [source.device] if source.device.type == "cuda" else []
    with bar, torch.random.fork_rng(devices), on_device(task, config, source.device):
        if validate is not None and run.step < run.total:
            # before any work is done that a refusal would lose
            validate.check()
        if config.on_nan == "back_off" and run.step == 0:
            # something to go back to
            checkpoints.save()
        watch = LossWatch(source, config.seed)
        while run.step < run.total:
            try:
                state = _train_epoch(run, source, checkpoints, listeners, watch, stop=stop)
            except Diverged as error:
                checkpoints.back_off(error, watch)
                continue
            if validate is not None and validate.due(state.epoch):
                run.last = {**run.last, **validate()}
                state = replace(state, metrics=run.last)
            for listener in listeners:
                listener.on_epoch(state)
            checkpoints.save()
    task.finish()
    if validate is not None and config.keep_best != "off":
        validate.load_best()
    task.model.eval()
    for listener in listeners:
        listener.on_end(_state(run, 0, run.last))
    return run.last


def _train_epoch(
    run: Run, source: Source, checkpoints: Checkpointer, listeners: Sequence[Callback], watch: LossWatch, *, stop: Stop
) -> TrainingState:
    """The rest of the run's epoch, step by step, with checkpoints in between; its means are in ``run.last`` then."""
    task, config, epoch = run.task, run.config, run.epoch
    began, images, world = time.monotonic(), 0, processes()[1]
    for raw, labels, ids in source.epoch(epoch, run.step % run.steps):
        seed = step_seed(config.seed, run.step)
        torch.manual_seed(seed)
        report_step(run.step)
        before = run.length.images_before(run.step)
        batch = batch_of(raw, labels, ids, config, seed=seed, epoch=epoch, step=run.step, images_before=before)
        set_learning_rate(task, run.rate * task.learning_rate(run.step / run.total, epoch, config.epochs))
        with named_when_lost():
            measured = train_step(task, batch)
        run.add(measured, source.device)
        watch.add(run.step, measured["loss"], raw, labels, ids)
        run.step += 1
        images += len(raw) * world
        state = _state(run, len(raw) * world, measured, epoch)
        for listener in listeners:
            listener.on_step(state)
        if run.step % run.steps:
            checkpoints.save_if_due(now=stop.asked)
            if stop.asked:
                _end(run, checkpoints)
    # the epoch's one wait for the device
    run.last = run.means()
    if not all(map(math.isfinite, run.last.values())) or not run.healthy():
        raise Diverged("a loss or a weight is not finite", None)
    run.sums, run.counts = {}, {}
    speed = images / max(time.monotonic() - began, 1e-9)
    return _state(run, images, run.last, epoch, speed)


def _end(run: Run, checkpoints: Checkpointer) -> NoReturn:
    """End this process, as SIGTERM asked: 143 is what a shell shows for it."""
    kept = "its checkpoint" if checkpoints.within_epochs else "that of its last whole epoch"
    where = f"; {kept} is in {checkpoints.folder}" if checkpoints.folder is not None else ""
    logger.warning("ended by SIGTERM after step %d of %d%s: run the same again to go on", run.step, run.total, where)
    raise SystemExit(128 + signal.SIGTERM)


def _state(
    run: Run, images: int, metrics: dict[str, Any], epoch: int | None = None, images_per_second: float = 0.0
) -> TrainingState:
    return TrainingState(
        task=run.task,
        step=run.step,
        total_steps=run.total,
        epoch=run.config.epochs - 1 if epoch is None else epoch,
        epochs=run.config.epochs,
        images=images,
        metrics=metrics,
        learning_rate=next(iter(run.task.optimizers.values())).param_groups[0]["lr"],
        images_per_second=images_per_second,
        terms=run.terms,
    )


def _check_batchnorm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        everywhere = isinstance(module, (BatchNorm1d, BatchNorm2d, nn.SyncBatchNorm))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and not everywhere:
            raise ValueError(
                f"{name} is a BatchNorm of one process's images: torch.nn.SyncBatchNorm.convert_sync_batchnorm makes "
                "it one of all (GPUs only), or use purify_fast.models.layers.BatchNorm2d"
            )
