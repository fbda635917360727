"""One step of a training: its updates, each with the mean gradient over the processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._process import processes
from ..data import crop_flip, to_float
from .config import FitConfig
from .distributed import average_
from .task import Batch, Metrics, Task, Update


def batch_of(
    images: Tensor, labels: Tensor, ids: Tensor, config: FitConfig, *, seed: int, epoch: int, augment: bool = True,
    step: int = 0, images_before: int = 0,
) -> Batch:  # fmt: skip
    """A step's input.

    Args:
        images: uint8 or float, ``[B, C, H, W]``.
        labels: int64 ``[B]``.
        ids: index of each image, int64 ``[B]``.
        config: how many epochs, and how to crop and mirror the images.
        seed: of the step.
        epoch: the epoch, from 0.
        augment: whether they are cropped and mirrored.
        step: of the whole run, from 0.
        images_before: images that the steps before have trained on.
    """
    x = to_float(images) if images.dtype == torch.uint8 else images
    if augment and (config.padding or config.flip):
        x = crop_flip(x, config.seed, ids, config.padding, config.flip, epoch=epoch)
    return Batch(x, labels, ids, seed, epoch=epoch, epochs=config.epochs, step=step, images_before=images_before)


def train_step(task: Task, batch: Batch) -> Metrics:
    """Take one step, all updates of it.

    Args:
        task: what is trained; its model is put into training mode.
        batch: what it is trained on.

    Returns:
        The last update's loss and metrics, detached, as means over the processes.
    """
    task.model.train()

    def take() -> Metrics:
        measured: Metrics = {}
        for update in task.updates(batch):
            measured = apply_update(task, update)
        return measured

    if task.graphs is None or processes()[1] > 1:
        # of several processes none may take a step again: the others would not wait for it
        return take()
    return task.graphs.without_if_memory_ends(take, batch.x.device)


def apply_update(task: Task, update: Update) -> Metrics:
    """Move the weights of one optimizer down the mean gradient over the processes.

    Args:
        task: what is trained.
        update: whose loss is lowered.

    Returns:
        The loss and the metrics, detached, as means over the processes.
    """
    optimizer = task.optimizers[update.optimizer]
    optimizer.zero_grad(set_to_none=True)
    update.loss.backward()
    measured = {"loss": update.loss.detach(), **update.metrics}
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    average_([*gradients, *measured.values()])
    task.before_step()
    optimizer.step()
    task.after_step()
    return measured


def set_learning_rate(task: Task, rate: float) -> None:
    """Give every group of every optimizer this learning rate.

    Args:
        task: what is trained.
        rate: the learning rate.
    """
    for optimizer in task.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate


@torch.no_grad()
def finite(values: Iterable[Tensor]) -> bool:
    """Whether all numbers in all tensors are finite; waits for the device once.

    Args:
        values: floating-point tensors on one device.
    """
    checks = [value.isfinite().all() for value in values]
    return bool(torch.stack(checks).all()) if checks else True
