"""Measure PGD-10 on a ResNet-18 in several forms: in plain PyTorch, as an expert writes it, and by this package.

No form draws a random start, so all forms take the same steps up to rounding. A captured form is a replay of a CUDA
graph for each step. Without a GPU nothing is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks import PGD, AttackContext
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import InferenceCopy, StepGraphs
from purify_fast.speed.frozen_copy import auto_dtype

from . import EXPERT, Case, Contestant, Job, autocast, expert
from .carso_inference import classifier

STEPS, EPS, ALPHA = 10, 8 / 255, 2 / 255


def sizes(quick: bool) -> tuple[int, ...]:
    """Return the numbers of images in a batch, the most important first."""
    return (8,) if quick else (256, 64, 1024) if torch.cuda.is_available() else (32,)


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


def job(run: Callable[[], Tensor], network: nn.Module, x: Tensor, y: Tensor) -> Job:
    """Return a job whose result is the rise in the loss of each image, judged by the network in float32."""

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(network(images), y, reduction="none").detach()

    return Job(run, lambda: loss(run()) - loss(x))


def _images(device: torch.device, quick: bool, count: int) -> tuple[Tensor, Tensor]:
    generator, side = torch.Generator().manual_seed(1), 8 if quick else 32
    x = torch.rand(count, 3, side, side, generator=generator)
    return x.to(device), (torch.arange(count) % 10).to(device)


def plain(device: torch.device, quick: bool, *, count: int, compiled: bool = False) -> Job:
    """Return the attack in plain PyTorch on the network as a user has it, with gradients of its weights too."""
    x, y = _images(device, quick, count)
    network, attacked = _network(quick).to(device), _network(quick).to(device)
    return job(plain_attack(torch.compile(attacked, dynamic=False, disable=not compiled), x, y), network, x, y)


def plain_attack(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return a function that attacks a model, whose weights get gradients too."""

    def run() -> Tensor:
        point = x
        for _ in range(STEPS):
            point = point.detach().requires_grad_()
            F.cross_entropy(model(point), y).backward()
            point = (x + (point.detach() + ALPHA * point.grad.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
        return point

    return run


def by_expert(device: torch.device, quick: bool, *, count: int, compiled: bool = False) -> Job:
    """Return the attack as an expert writes it (see `expert`), with the arguments of `plain`."""
    x, y = _images(device, quick, count)
    network = _network(quick).to(device)
    step = expert.ascent(expert.loss_of(expert.FrozenCopy(network).model), device, compiled, constant=True)
    return job(lambda: expert.attack(step, x, y, EPS, ALPHA, STEPS), network, x, y)


def ours(device: torch.device, quick: bool, *, count: int, compiled: bool = False, captured: bool = False) -> Job:
    """Return the attack by this package, with an inference copy in the dtype that is faster."""
    x, y = _images(device, quick, count)
    graphs = StepGraphs("always") if captured else None
    network = _network(quick).to(device)
    copy = InferenceCopy(network, tuple(x.shape[1:]), auto_dtype(network, x), compile=compiled)
    attack = PGD(alpha=ALPHA, steps=STEPS, random_start=False, keep_best=False)
    context = AttackContext(eps=EPS, graphs=graphs)

    def run() -> Tensor:
        found = attack.run(copy, x, y, context).images
        if graphs is not None and graphs.refusals and device.type == "cuda":
            raise RuntimeError(f"the step was not captured: {'; '.join(graphs.refusals)}")
        return found

    if compiled:
        # A step is compiled when it begins for the second time.
        for _ in range(2):
            run()
    return job(run, network, x, y)


def forms(count: int) -> dict[str, Contestant]:
    """Return the forms of the attack on ``count`` images."""
    under_cast = partial(autocast, partial(plain, count=count, compiled=True))
    theirs = partial(Contestant, raised=True, tf32=True, raced=True)
    own: dict[str, dict[str, bool]] = {
        "ours": {},
        "ours, captured": {"captured": True},
        "ours, compiled": {"compiled": True},
        "ours, compiled and captured": {"compiled": True, "captured": True},
    }
    return {
        # By default, PyTorch computes convolutions of float32 in TF32.
        "plain, PyTorch defaults": Contestant(partial(plain, count=count), False, tf32=True),
        "torch.compile of plain": Contestant(under_cast, True, tf32=True),
        EXPERT: theirs(partial(by_expert, count=count)),
        f"{EXPERT}, compiled": theirs(partial(by_expert, count=count, compiled=True)),
        **{name: Contestant(partial(ours, count=count, **how), True, raced=True) for name, how in own.items()},
    }


def cases(quick: bool) -> dict[str, Case]:
    on_gpu, made = quick or torch.cuda.is_available(), {}
    for count in sizes(quick):
        every = {name: form for name, form in forms(count).items() if on_gpu or "captured" not in name}
        made[f"{count} images"] = Case(f"{count} images, PGD-{STEPS}", 0.05, every)
    return made
