"""What a training does on a GPU to wait less: captured attack steps, raced convolutions, fused optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..speed.graphs.step_graphs import StepGraphs
from ..speed.precision import raced_convolutions
from .config import FitConfig
from .task import Task


@contextlib.contextmanager
def on_device(task: Task, config: FitConfig, device: torch.device) -> Iterator[None]:
    """Within the block, a training is run as its settings say for the device; on a CPU they change nothing.

    Args:
        task: what is trained; its weights are where they are trained, and its optimizers hold what they resume with.
        config: the settings.
        device: of the images.
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
    """Let an optimizer take its step in one kernel for all of its weights, or as it was made to.

    A checkpoint may have been written by a run on another device: what it says of this is not followed.

    Args:
        optimizer: one of torch's; others, and those that have no such kernel, stay as they are.
        fused: whether to.

    Returns:
        Whether it does now.
    """
    if "fused" not in optimizer.defaults:
        return False
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    special = any(optimizer.defaults.get(name) for name in ("capturable", "differentiable"))
    fused = fused and not special and all(weight.is_floating_point() for weight in weights)
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
