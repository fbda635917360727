"""The training loop that all methods share. A run can be resumed after it was killed at any moment.

The result of a step depends only on the seed, the number of the step, and the state in the checkpoint: the order of the
images, the random starts of attacks and torch's global generator are seeded for each step. So a run that was killed and
resumed ends with the same weights as a run without interruption, to the bit on the same CPU. Sums in another number of
threads are rounded otherwise.

Several processes (`purify_fast.training.distributed`) share each batch. They end with the weights of a single process,
up to rounding. After the backward pass, they average all gradients and metrics in one exchange.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._files import folder_lock
from .._memory import ran_out_of_memory
from .._process import processes
from .._settings import refuse_divided
from ..speed.draws import same_draws
from ..speed.graphs.graphed_loop import StepGraphs
from ..speed.precision import fast_bfloat16, float32_products, raced_convolutions, whole_float32_by_default
from .callbacks import Callback, ProgressBar, TrainingState
from .config import FitConfig
from .distributed import average_, exchanges, from_first, synchronized_batchnorm
from .optimizers import check_groups, fuse, set_learning_rate, weights_of
from .run import Run
from .sources import Images, Loader, make_sources, seed_draws, step_seed
from .task import Batch, Metrics, Task, frozen_parts

logger = logging.getLogger("purify_fast")

#: The losses and weights are checked after every INTERVAL steps, because a check waits for the device.
INTERVAL = 100


@whole_float32_by_default()
def fit(
    task: Task,
    x: Images,
    y: torch.Tensor | None,
    config: FitConfig,
    folder: str | Path | None = None,
    title: str = "train",
    progress: bool = True,
    *,
    callbacks: Sequence[Callback] = (),
    validation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Train ``task``. If ``folder`` holds a checkpoint of the same run, resume from it.

    To train with several processes, make a process group, and call `fit` with the same arguments in every process.
    Under torchrun, the command line makes the group; elsewhere ``torch.distributed.init_process_group`` does. All start
    from the weights of the first process, which alone reads and writes the folder. A run may be resumed with another
    number of processes. Several processes give the same weights as a single process, up to rounding, with two
    exceptions: a model that draws random numbers without `purify_fast`, such as by torch's dropout, draws the same
    numbers in every process, and the published training of CARSO may attack fewer images
    (`purify_fast.methods.carso.task.CarsoTask.balanced_batch`).

    Args:
        task: the training: model, optimizers and step.
        x: the images to train on, in one of two forms. **Images**: a tensor, uint8 ``[N, C, H, W]``. A tensor on
            the CPU is moved to a GPU if it is small (`purify_fast.training.sources.MOST_BYTES`); batches of another are
            copied to the model's device. Every process passes all images. **A loader**: a
            DataLoader or another iterable with a length, of (images, labels) or (images, labels, indices); the images
            are float in [0, 1] or uint8. Every process passes its own share. `fit` does not control the order, so a run
            can be resumed between epochs only. A resumed run repeats the order if the loader draws it from torch's
            global generator or from the DataLoader's own generator, as with ``shuffle=True``.
        y: labels of the images, int64 ``[N]``; None with a loader.
        config: length and settings of the training. With a loader, its batch_size and drop_last have no effect.
        folder: folder for ``checkpoint.safetensors`` and ``log.jsonl``; None writes no files.
        title: title of the progress bar.
        progress: whether to show a progress bar.
        callbacks: further listeners to the training, see `Callback`.
        validation: held-out images and labels, tensors like x and y, in place of the config's validation_share. Every
            process passes all of them.

    Returns:
        The last epoch's mean metrics, and those of its validation.

    Raises:
        TypeError: ``task`` is not a `Task`, or the images have a form that cannot be trained on.
        ValueError: images, labels or the loader are unusable, or the model does not accept them; there are fewer images
            than a batch has; the task does not measure the metric of keep_best; the folder has a checkpoint of
            another run. With several processes also: they cannot share a batch evenly, they have different data or
            settings, or a model in training mode has a BatchNorm that is not synchronized. The model has DTensors as
            weights, or weights on several devices.
        FloatingPointError: the loss or the weights are not finite. The last checkpoint is kept.
        FolderInUse: another run writes into the folder.
        RuntimeError: memory ran out in a step beside CUDA graphs; the last checkpoint is kept. With several processes,
            another process ended, or did not answer within the group's timeout.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task must be a purify_fast.training.Task, got {type(task).__name__}")
    folder = None if folder is None else Path(folder)
    if not any(weight.requires_grad for item in task.optimizers.values() for weight in weights_of(item)):
        raise ValueError("task must have a weight to train, but no weight of its optimizers needs a gradient")
    for optimizer in task.optimizers.values():
        check_groups(optimizer)
    refuse_divided(task.model)
    source, held_out = make_sources(task, x, y, config, validation)
    run = Run(task, config, (source, held_out), folder)
    device = run.source.device
    task.frozen, task.compiles = frozen_parts(task.model), config.compile
    if processes()[1] > 1:
        task.train()
    first = processes()[0] == 0
    # The caller may be within torch.no_grad(), torch.inference_mode() or torch.autocast(). The cache of an autocast is
    # emptied at the end of the outermost one only, so it would keep the weights of earlier steps.
    autocast = torch.autocast(device.type, enabled=False, cache_enabled=False)
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.enable_grad(), autocast:
        stack.enter_context(synchronized_batchnorm(task.model))
        if config.compile and exchanges(task.model):
            raise ValueError("compile must be False: BatchNorms wait for the other processes, got True")
        # If the folder is locked, all processes raise the error.
        from_first(partial(stack.enter_context, folder_lock(folder)))
        run.resume()
        task.begin()
        run.write_log()
        if task.tf32:
            stack.enter_context(float32_products(tf32=True))
        bar = ProgressBar(title, run, progress and first)
        listeners = [bar, *callbacks] if first else []
        with bar.bar, same_draws(task.model, device), step_settings(task, config, device):
            _train(run, listeners)
        task.finish()
        if run.best:
            task.model.load_state_dict(run.best["model"])
        task.model.eval()
        for listener in listeners:
            listener.on_end(_state(run, 0, run.last, len(run.rows) - 1))
        return run.last


def _train(run: Run, listeners: Sequence[Callback]) -> None:
    for epoch in range(len(run.rows), run.config.epochs):
        last = epoch + 1 == run.config.epochs
        due = run.held_out is not None and (last or (epoch + 1) % run.config.validation_every == 0)
        # After a kill in a validation, the epoch's steps have all been taken.
        state = _state(run, 0, run.last, epoch)
        if run.epoch == epoch:
            state = _train_epoch(run, listeners)
            if due:
                # The memory may end in a validation.
                run.save()
        if due:
            run.validate()
            state = replace(state, metrics=run.last)
        run.add_row(state.epoch, state.learning_rate, state.images_per_second)
        for listener in listeners:
            listener.on_epoch(state)
        run.save()


def _train_epoch(run: Run, listeners: Sequence[Callback]) -> TrainingState:
    """Train the rest of the run's epoch, with checkpoints in between, and put the epoch's means into ``run.last``."""
    task, config, epoch = run.task, run.config, run.epoch
    began, images, world = time.monotonic(), 0, processes()[1]
    # A callback may have unfrozen parts of the model, or given it a generator.
    task.train()
    task.frozen, run.own = frozen_parts(task.model), run.generators()
    for raw in run.source.epoch(epoch, run.step % run.steps):
        if isinstance(run.source, Loader) and not images:
            # The shape and the labels of a loader's images are not known before.
            run.shape = list(raw[0].shape[1:])
            task.check(tuple(run.shape), int(raw[1].max()) + 1)
        seed = step_seed(config.seed, run.step)
        seed_draws(seed, run.own)
        batch = run.batch(raw, run.step, seed)
        rate = task.learning_rate(run.step / run.total, epoch, config.epochs)
        set_learning_rate(task.optimizers.values(), rate)
        measured = train_step(task, batch, config.accumulate or 1)
        run.add(measured)
        run.step += 1
        if run.step % INTERVAL == 0:
            run.check_finite()
        count = len(batch.x) * world
        images += count
        for listener in listeners:
            listener.on_step(_state(run, count, measured, epoch))
        if run.step % run.steps:
            run.save_if_due()
    run.check_finite()
    run.last = run.means()
    run.sums, run.counts = {}, {}
    return _state(run, images, run.last, epoch, images / max(time.monotonic() - began, 1e-9))


def _state(run: Run, images: int, metrics: dict[str, Any], epoch: int, images_per_second: float = 0.0) -> TrainingState:
    place = run.task, run.step, run.total, epoch, run.config.epochs
    rate = next(iter(run.task.optimizers.values())).param_groups[0]["lr"]
    return TrainingState(*place, images, metrics, learning_rate=rate, images_per_second=images_per_second)


# -- a step -----------------------------------------------------------------------------------------------------------


def train_step(task: Task, batch: Batch, accumulate: int = 1) -> Metrics:
    """Take a training step with all of its updates, with the model in training mode."""
    task.train()
    measured: Metrics = {}
    try:
        for name, measured in gradients(task, batch, accumulate):
            optimizer = task.optimizers[name]
            average_([*(p.grad for p in weights_of(optimizer) if p.grad is not None), *measured.values()])
            if task.max_gradient is not None:
                torch.nn.utils.clip_grad_norm_(weights_of(optimizer), task.max_gradient)
            step_of(optimizer)
            task.after_step()
    except Exception as error:
        # The step is not repeated without the graphs, because it may have changed weights and BatchNorms already.
        if task.graphs and ran_out_of_memory(error):
            cure = "resume the run with cuda_graphs='off' or a smaller batch"
            raise RuntimeError(f"memory ran out in a training step beside CUDA graphs: {cure}") from error
        raise
    return measured


def step_of(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer change its weights; TypeError if it needs a closure."""
    try:
        optimizer.step()
    except (TypeError, AssertionError, RuntimeError) as error:
        if "closure" not in str(error):
            raise
        name = type(optimizer).__name__
        raise TypeError(f"optimizer must take a step without a closure, but {name} says: {error}") from error


def gradients(task: Task, batch: Batch, accumulate: int = 1) -> Iterator[tuple[str, Metrics]]:
    """Compute the gradients of each update, and yield its optimizer's name, loss and metrics. The caller applies it."""
    running = [(task.updates(part), len(part.x) / len(batch.x)) for part in parts_of(batch, accumulate)]
    while True:
        name, of_parts = "", list[Metrics]()
        for updates, share in running:
            if (update := next(updates, None)) is None:
                continue
            if not of_parts:
                name = update.optimizer
                task.optimizers[name].zero_grad(set_to_none=True)
            (update.loss if share == 1 else share * update.loss).backward()
            shown = {"loss": update.loss.detach(), **update.metrics}
            of_parts.append(shown if share == 1 else {name: share * value for name, value in shown.items()})
        if not of_parts:
            return
        yield name, {key: sum((part[key] for part in of_parts[1:]), of_parts[0][key]) for key in of_parts[0]}


def parts_of(batch: Batch, number: int) -> list[Batch]:
    """Return a batch in parts of nearly equal size, or alone if it is to have one part."""
    parts, first = list[Batch](), 0
    split = (item.tensor_split(number) for item in (batch.x, batch.y, batch.sample_ids))
    for x, y, ids in zip(*split, strict=True):
        if len(x):
            parts.append(replace(batch, x=x, y=y, sample_ids=ids, first=first))
            first += len(x)
    return parts


@contextlib.contextmanager
def step_settings(task: Task, config: FitConfig, device: torch.device) -> Iterator[None]:
    """Within the block, use CUDA graphs, cuDNN's benchmark and fused optimizers, which make steps on a GPU faster.

    A warning says what the precision "auto" would give on this GPU, if the training does not use its matrix units.
    """
    own = getattr(getattr(task, "config", None), "precision", None)
    slow = device.type == "cuda" and own == "float32" and not torch.backends.cudnn.allow_tf32
    if slow and processes()[0] == 0 and fast_bfloat16(device):
        logger.warning("the matrix units of %s are not used: precision='auto' multiplies in bfloat16 on it", device)
    for optimizer in task.optimizers.values():
        fuse(optimizer, device.type == "cuda")
    before = task.graphs
    if config.cuda_graphs == "off":
        task.graphs = None
    elif task.graphs is None and device.type == "cuda":
        task.graphs = StepGraphs(config.cuda_graphs)
    try:
        with raced_convolutions(config.cudnn_benchmark, device):
            yield
    finally:
        # Without a reference to the graphs, their memory is freed.
        task.graphs = before
