"""Measure the package as users run it: whole trainings, also of a batch that fills the card, and attacks in a loop.

Every row tells how many CUDA graphs were replayed. On a GPU, a row without a replay has failed.
"""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from purify_fast import frozen_copy
from purify_fast._validation import in_one_line
from purify_fast.attacks import pgd
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs.graphed_loop import CAPTURE_STEPS
from purify_fast.training import Callback, ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit
from purify_fast.training.loop import step_settings, train_step

from ..speed.pipelines import random_batch
from ..speed.timing import now

EPS, STEPS = 8 / 255, 10
#: The length of a step, except where so few steps of it would not reach EPS.
ALPHA = 2 / 255
#: The share of the card's memory that a step without a graph takes in the part "full card".
SHARE = 0.7
#: The steps of the attack there: a step on so many images takes seconds, and more steps need no more memory.
FEW_STEPS = 2
#: The largest number of images in a batch.
MOST_IMAGES = 30_000
#: The numbers of images from which the memory of a larger batch is computed.
PROBES = (128, 512)


@contextlib.contextmanager
def replays() -> Iterator[list[None]]:
    """Within the block, collect an entry for each replay of a CUDA graph, whoever has captured the graph."""
    seen: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(None)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counted):
        yield seen


def row(
    form: str, device: torch.device, seen: list[None], said: list[Any], *, captured: bool = True, **columns: Any
) -> dict:
    """Return a row. What should be captured has failed on a GPU if no graph was replayed."""
    verdict = "right" if seen or not captured or device.type == "cpu" else "failed"
    texts = dict.fromkeys(str(one.message).splitlines()[0] for one in said)
    return {"form": form, **columns, "replays": len(seen), "verdict": verdict, "warnings": "; ".join(texts)}


def classifier_task(device: torch.device, small: bool, steps: int) -> ClassifierTask:
    torch.manual_seed(0)
    model = PreActResNet18(width=4 if small else 64).to(device)
    attack = TrainingAttack(eps=EPS, steps=steps, alpha=max(ALPHA, EPS / steps))
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return ClassifierTask(model, ClassifierConfig(attack=attack, precision=precision))


class _Epochs(Callback):
    """Collects the speed of each epoch, and the number of replays until its end."""

    def __init__(self, seen: list[None]):
        self.seen, self.rows = seen, list[tuple[float, int]]()

    def on_epoch(self, state: Any) -> None:
        self.rows.append((state.images_per_second, len(self.seen)))


def _trained(form: str, task: ClassifierTask, count: int, config: FitConfig, device: torch.device) -> list[dict]:
    """Train by `fit` from beginning to end, from random images on the CPU. Return a row for each epoch.

    A row says whether the training ended, and whether memory ran out in a validation, so that the graphs were dropped.
    """
    x = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    task.graphs = graphs = StepGraphs(config.cuda_graphs)
    error = ""
    with replays() as seen, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        epochs, begin = _Epochs(seen), now(device)
        try:
            fit(task, x, torch.arange(count) % 10, config, progress=False, callbacks=[epochs])
        except Exception as raised:
            error = in_one_line(raised)
        whole, before, rows = now(device) - begin, 0, []
    about = {"images": config.batch_size, "whole_s": f"{whole:.2f}", "ended": not error, "error": error}
    about |= {"captures": graphs.captures, "dropped": graphs.mode == "off"}
    for epoch, (speed, until) in enumerate([*epochs.rows, (0.0, len(seen))] if error else epochs.rows):
        rows.append(
            row(f"{form}, epoch {epoch}", device, seen[before:until], said, images_per_s=f"{speed:.0f}", **about)
        )
        before = until
    return [made | {"verdict": "failed"} for made in rows] if error else rows


def training(device: torch.device, small: bool) -> list[dict]:
    """Train with a validation after every epoch. Return a row for each epoch."""
    count, batch = (64, 16) if small else (12_800, 128)
    config = FitConfig(3, batch, validation_share=0.125, flip=True, padding=4)
    return _trained("fit", classifier_task(device, small, 2 if small else STEPS), count, config, device)


def network(name: str, small: bool) -> nn.Module:
    torch.manual_seed(0)
    if name == "ResNet-18":
        return PreActResNet18(width=4 if small else 64).eval()
    depth, heads, width = (2, 2, 16) if small else (12, 6, 384)
    made = VisionTransformer(32, 4, depth, heads, width, 4 * width, num_classes=10)
    # The last layer begins with zeros, so that no gradient would reach the images.
    nn.init.normal_(made.heads.head.weight, std=0.02)
    return made.eval()


def loop(device: torch.device, small: bool, name: str) -> dict:
    """Attack a frozen copy in a loop of the user's own, which trains the model between the attacks."""
    count, calls = (8, 3) if small else (256, 40)
    model = network(name, small).to(device)
    batch = random_batch(device, count, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    times: list[float] = []
    with replays() as seen, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast = frozen_copy(model, batch.x)
        for _ in range(calls):
            begin = now(device)
            point = pgd(fast, batch.x, batch.y, eps=EPS, alpha=ALPHA, steps=2 if small else STEPS)
            times.append(now(device) - begin)
            optimizer.zero_grad()
            F.cross_entropy(model(point), batch.y).backward()
            optimizer.step()
    usual = statistics.median(times[calls // 2 :])
    numbers = {"images": count, "images_per_s": f"{count / usual:.0f}", "ms": f"{1e3 * usual:.2f}"}
    return row(f"loop, {name}", device, seen, said, **numbers, first_ms=f"{1e3 * times[0]:.1f}")


def filling(device: torch.device, small: bool) -> int:
    """Return the number of images whose training step without a graph fills 70 % of the card's memory."""
    if device.type != "cuda":
        return 16
    peaks = [_peak(device, small, count) for count in PROBES]
    slope = (peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0])
    room = SHARE * torch.cuda.get_device_properties(device).total_memory - peaks[0]
    # Above this number, a map of the network would have more elements than 32 bits can count.
    return min(MOST_IMAGES, PROBES[0] + int(room / slope))


def full(device: torch.device, small: bool) -> dict:
    """Train on batches that fill 70 % of the card's memory without a graph.

    An epoch is a single step. A step of the attack is captured after `CAPTURE_STEPS`, and the validation comes after
    the last epoch.
    """
    count, epochs = filling(device, small), CAPTURE_STEPS + 3
    config = FitConfig(epochs, count, validation_share=0.5, validation_every=epochs)
    return _trained("full card", classifier_task(device, small, FEW_STEPS), 2 * count, config, device)[-1]


def _peak(device: torch.device, small: bool, count: int) -> int:
    """The bytes that a training step without a graph needs."""
    task, batch = classifier_task(device, small, FEW_STEPS), random_batch(device, count, 32, 1)
    with step_settings(task, FitConfig(1, cuda_graphs="off"), device):
        train_step(task, batch)
        torch.cuda.reset_peak_memory_stats(device)
        train_step(task, batch)
    return torch.cuda.max_memory_allocated(device)


#: The parts, the most important first.
PARTS: dict[str, Callable[[torch.device, bool], dict | list[dict]]] = {
    "fit": training,
    "loop, ResNet-18": lambda device, small: loop(device, small, "ResNet-18"),
    "loop, ViT": lambda device, small: loop(device, small, "ViT"),
}
