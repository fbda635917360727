"""Measure PGD-10 on a ResNet-18 in eight forms: as a user writes it, as an expert writes it, and by this package.

No form draws a random start, so all forms take the same steps up to rounding. A captured form is a replay of a CUDA
graph for each step. Without a GPU nothing is captured, and there are only the small cases of a quick run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks import pgd
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import InferenceCopy, StepGraphs

from . import Case, Contestant, Job
from .carso_inference import classifier

STEPS, EPS, ALPHA = 10, 8 / 255, 2 / 255
EXPERT = "expert: bfloat16 weights, torch.compile reduce-overhead"
CAPTURED, COMPILED = "ours, captured", "ours, compiled and captured"


def sizes(quick: bool) -> tuple[int, ...]:
    """Return the numbers of images in a batch."""
    return (8,) if quick else (64, 256) if torch.cuda.is_available() else ()


def _network(quick: bool) -> nn.Module:
    if not quick:
        return classifier()
    torch.manual_seed(0)
    network = SmallCNN(3, 10, (8, 8), 4).eval()
    with torch.no_grad():
        for weight in network.parameters():
            # With the weights of a fresh network, the attack would hardly change the loss.
            weight.mul_(3)
    return network


def _job(run: Callable[[], Tensor], network: nn.Module, x: Tensor, y: Tensor) -> Job:
    """Return a job whose result is the rise in the loss of each image, judged by the network in float32."""

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(network(images), y, reduction="none").detach()

    return Job(run, lambda: loss(run()) - loss(x))


def _images(device: torch.device, quick: bool, count: int) -> tuple[Tensor, Tensor]:
    generator, side = torch.Generator().manual_seed(1), 8 if quick else 32
    x = torch.rand(count, 3, side, side, generator=generator)
    return x.to(device), (torch.arange(count) % 10).to(device)


def plain(device: torch.device, quick: bool, *, count: int, lean: str = "", mode: str | None = None) -> Job:
    """Return the attack in plain PyTorch.

    Args:
        device: device that computes.
        quick: True for a small network and small images.
        count: number of images.
        lean: "" keeps the network as a user has it. "autocast" freezes the weights, makes them channels_last, and
            computes products in bfloat16. "bfloat16" also converts the weights.
        mode: mode of `torch.compile`. None compiles nothing.
    """
    x, y = _images(device, quick, count)
    network, attacked = _network(quick).to(device), _network(quick).to(device)
    if lean:
        attacked.requires_grad_(False).to(memory_format=torch.channels_last)
    if lean == "bfloat16":
        attacked.bfloat16()
    called = attacked if mode is None else torch.compile(attacked, dynamic=False, mode=mode)

    def logits(point: Tensor) -> Tensor:
        # In the mode "reduce-overhead", a step may overwrite the results of the step before.
        torch.compiler.cudagraph_mark_step_begin()
        given = point.bfloat16() if lean == "bfloat16" else point
        given = given.contiguous(memory_format=torch.channels_last) if lean else given
        with torch.autocast(device.type, torch.bfloat16, enabled=lean == "autocast"):
            return called(given).float()

    def run() -> Tensor:
        point = x
        for _ in range(STEPS):
            point = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits(point), y), point)
            point = (x + (point.detach() + ALPHA * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
        return point

    return _job(run, network, x, y)


def ours(device: torch.device, quick: bool, *, count: int, compiled: bool = False, captured: bool = False) -> Job:
    """Return the attack by this package, with an inference copy in bfloat16.

    Args:
        device: device that computes.
        quick: True for a small network and small images.
        count: number of images.
        compiled: True to compile the inference copy.
        captured: True to capture the step of the attack as a CUDA graph.
    """
    x, y = _images(device, quick, count)
    network, graphs = _network(quick).to(device), StepGraphs("always") if captured else None
    copy = InferenceCopy(network, tuple(x.shape[1:]), torch.bfloat16, compile=compiled)
    how: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "random_start": False, "graphs": graphs}

    def run() -> Tensor:
        found = pgd(copy, x, y, **how)
        if graphs is not None and graphs.refusal and device.type == "cuda":
            raise RuntimeError(f"the step was not captured: {graphs.refusal}")
        return found

    return _job(run, network, x, y)


def forms(count: int) -> dict[str, Contestant]:
    """Return the eight forms of the attack on ``count`` images."""
    makes: dict[str, Callable[..., Job]] = {
        "plain, PyTorch defaults": plain,
        "frozen, channels_last, autocast bf16": partial(plain, lean="autocast"),
        "expert: frozen, channels_last, autocast, torch.compile": partial(plain, lean="autocast", mode="default"),
        EXPERT: partial(plain, lean="bfloat16", mode="reduce-overhead"),
        "ours, eager": ours,
        CAPTURED: partial(ours, captured=True),
        "ours, compiled": partial(ours, compiled=True),
        COMPILED: partial(ours, compiled=True, captured=True),
    }
    # By default, PyTorch computes convolutions of float32 in TF32.
    return {name: Contestant(partial(make, count=count), True, tf32=make is plain) for name, make in makes.items()}


def cases(quick: bool) -> dict[str, Case]:
    return {f"{count} images": Case(f"{count} images, PGD-{STEPS}", 0.05, forms(count)) for count in sizes(quick)}
