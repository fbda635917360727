"""One step of a training: its updates, each with the mean gradient over the processes; and what makes it fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .._process import processes
from ..speed.graphs.step_graphs import StepGraphs
from ..speed.precision import raced_convolutions
from .config import FitConfig
from .distributed import average_
from .task import Batch, Metrics, Task, Update


def train_step(task: Task, batch: Batch) -> Metrics:
    """Take one step, all updates of it, with the model in training mode.

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

    Returns:
        The loss and the metrics, detached, as means over the processes.
    """
    optimizer = task.optimizers[update.optimizer]
    optimizer.zero_grad(set_to_none=True)
    update.loss.backward()
    measured = {"loss": update.loss.detach(), **update.metrics}
    gradients = [weight.grad for weight in weights_of(optimizer) if weight.grad is not None]
    average_([*gradients, *measured.values()])
    task.before_step()
    optimizer.step()
    task.after_step()
    return measured


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights that an optimizer moves."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def set_learning_rate(task: Task, rate: float) -> None:
    """Give every group of every optimizer this learning rate."""
    for optimizer in task.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate


@torch.no_grad()
def finite(values: Iterable[Tensor]) -> bool:
    """Whether all numbers in all tensors, which are on one device, are finite; waits for the device once."""
    checks = [value.isfinite().all() for value in values]
    return bool(torch.stack(checks).all()) if checks else True


@contextlib.contextmanager
def accelerated_steps(task: Task, config: FitConfig, device: torch.device) -> Iterator[None]:
    """Within the block, steps on a GPU wait less: captured attacks, raced convolutions, fused optimizers.

    On a CPU it changes nothing. The task's weights are where they are trained, and its optimizers hold what they resume
    with.
    """
    for optimizer in task.optimizers.values():
        fuse(optimizer, config.fused_optimizers == "auto" and device.type == "cuda")
    before = task.graphs
    if config.cuda_graphs == "off":
        task.graphs = None
    elif task.graphs is None and device.type == "cuda":
        task.graphs = StepGraphs(config.cuda_graphs)
    try:
        with raced_convolutions(config.cudnn_benchmark, device):
            yield
    finally:
        # with the graphs goes the memory that only they use
        task.graphs = before


def fuse(optimizer: torch.optim.Optimizer, fused: bool) -> bool:
    """Let an optimizer take its step in one kernel for all of its weights, or as it was constructed to.

    A checkpoint may have been written by a run on another device: what it says of this is not followed. An optimizer
    that has no such kernel stays as it is.

    Returns:
        Whether it takes its step in one kernel now.
    """
    if "fused" not in optimizer.defaults:
        return False
    special = any(optimizer.defaults.get(name) for name in ("capturable", "differentiable"))
    fused = fused and not special and all(weight.is_floating_point() for weight in weights_of(optimizer))
    for group in optimizer.param_groups:
        group["fused"] = True if fused else optimizer.defaults["fused"]
        group["foreach"] = False if fused else optimizer.defaults["foreach"]
    if special:
        return fused
    for weight, state in optimizer.state.items():
        step = state.get("step")
        # the kernel counts the steps where the weights are, the other forms on the host
        if isinstance(step, Tensor):
            state["step"] = step.to(weight.device if fused else "cpu", torch.float32)
    return fused
