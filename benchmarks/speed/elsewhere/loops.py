"""The loops of other people: trainings, attacks in evaluation mode and through a diffusion, and attacks of packages."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import purify_fast

from ..pipelines import expert
from ..pipelines.diffusion import denoiser
from . import (
    ALPHA,
    EPS,
    WRITTEN,
    Batches,
    Dtype,
    Form,
    Frozen,
    Row,
    best,
    cast,
    copied,
    network,
    with_copy,
    with_our_line,
)

#: Steps of the attack in trainings. CARSO takes 40 steps, of which a row measures some.
#: The packages take up to 100 steps.
STEPS, CARSO_STEPS = 10, 5


def stepped(near: Tensor, gradient: Tensor, x: Tensor, alpha: float) -> Tensor:
    """Return points after a step along the signs of a gradient, inside the L-inf balls and inside [0, 1]."""
    return (x + (near + alpha * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)


def pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by PGD (Madry et al., ICLR 2018)."""
    near = x + torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(STEPS):
        near.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(near), y), near)
        near = stepped(near.detach(), gradient, x, ALPHA)
    return near


def carso(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack a classifier whose weights are not trained, as a training of CARSO does (Ballarin et al., 2023)."""
    model.requires_grad_(False)
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(CARSO_STEPS):
        delta.requires_grad_()
        F.cross_entropy(model(x + delta), y, reduction="sum").backward()
        delta = stepped(x + delta.detach(), delta.grad, x, ALPHA) - x
    return x + delta


#: Steps of TRADES' attack, weight of its divergence, and length of AWP's step relative to the weights.
TRADES_STEPS, BETA, GAMMA = 10, 6.0, 5e-3


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the trainings."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def trained(model: nn.Module, batches: Batches, loss: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Train a model, and yield the loss of each step."""
    optimizer = optimizer_of(model)
    for x, y in batches:
        value = loss(model, x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.detach()


def trades_attack(model: nn.Module, x: Tensor) -> Tensor:
    """Increase the divergence of the predictions from those of the images, in evaluation mode."""
    model.eval()
    near = x + 0.001 * torch.randn_like(x)
    for _ in range(TRADES_STEPS):
        near.requires_grad_()
        target = F.softmax(model(x), 1)
        divergence = F.kl_div(F.log_softmax(model(near), 1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, near)
        near = stepped(near.detach(), gradient, x, ALPHA)
    return near


def trades_attack_once(model: nn.Module, x: Tensor) -> Tensor:
    """Do the same as `trades_attack`, and compute the constant target once."""
    model.eval()
    near = x + 0.001 * torch.randn_like(x)
    target = F.softmax(model(x), 1)
    for _ in range(TRADES_STEPS):
        near.requires_grad_()
        divergence = F.kl_div(F.log_softmax(model(near), 1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, near)
        near = stepped(near.detach(), gradient, x, ALPHA)
    return near


def trades_loss(model: nn.Module, x: Tensor, y: Tensor, near: Tensor) -> Tensor:
    """Return the loss of TRADES (Zhang et al., ICML 2019) in training mode."""
    model.train()
    logits, moved = model(x).float(), model(near).float()
    robust = F.kl_div(F.log_softmax(moved, 1), F.softmax(logits, 1), reduction="batchmean")
    return F.cross_entropy(logits, y) + BETA * robust


def trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of TRADES on a batch."""
    return trades_loss(model, x, y, trades_attack(model, x))


def trades_by_expert(model: nn.Module, x: Tensor, y: Tensor, fast: Frozen) -> Tensor:
    """Return the loss of TRADES on a batch, whose attack runs on a frozen copy."""
    near = trades_attack_once(fast, x)
    with cast(fast.dtype):
        return trades_loss(model, x, y, near)


def trades_with_our_lines(model: nn.Module, x: Tensor, y: Tensor, fast: nn.Module) -> Tensor:
    """Return the loss of TRADES on a batch, whose attack runs on a frozen copy of this package."""
    return trades_loss(model, x, y, trades_attack_once(fast, x))


def attack(model: nn.Module, x: Tensor, y: Tensor, alpha: float, steps: int) -> Tensor:
    """Attack a model in its present mode. ``backward`` also computes gradients of the weights, which nobody uses."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(steps):
        delta.requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        delta = stepped(x + delta.detach(), delta.grad, x, alpha) - x
    return delta


def fast_loss(model: nn.Module, x: Tensor, y: Tensor, alpha: float, steps: int) -> Tensor:
    """Return the loss on images attacked in training mode, as in "Fast is better than free" (Wong et al., ICLR 2020).

    With one step it is FGSM from a random start, and with seven steps PGD.
    """
    model.train()
    delta = attack(model, x, y, alpha, steps)
    return F.cross_entropy(model(x + delta), y)


def fast_with_our_line(model: nn.Module, x: Tensor, y: Tensor, alpha: float, steps: int) -> Tensor:
    """Return the loss of `fast_loss`, by this package."""
    model.to(memory_format=torch.channels_last).train()
    with purify_fast.images_only(model):
        delta = attack(model, x, y, alpha, steps)
    return F.cross_entropy(model(x + delta), y)


def fast_by_expert(model: nn.Module, x: Tensor, y: Tensor, alpha: float, steps: int, dtype: Dtype) -> Tensor:
    """Return the loss of `fast_loss`. The attack computes no gradient of the weights."""
    model.to(memory_format=expert.LAST).train()
    with cast(best(dtype)):
        model.requires_grad_(False)
        delta = attack(model, x, y, alpha, steps)
        model.requires_grad_(True)
        return F.cross_entropy(model(x + delta), y)


def perturb(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Move the weights along their gradients, by a share of their norms. Return the weights with their moves."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    moves = [GAMMA * w.norm() / (g.norm() + 1e-12) * g for w, g in zip(weights, gradients, strict=True)]
    for w, move in zip(weights, moves, strict=True):
        w.data.add_(move)
    return list(zip(weights, moves, strict=True))


def awp(model: nn.Module, batches: Batches, attacked: nn.Module, context: Any) -> Iterator[Tensor]:
    """Train by adversarial weight perturbation (Wu et al., NeurIPS 2020), with PGD in evaluation mode."""
    optimizer = optimizer_of(model)
    for x, y in batches:
        near = pgd(attacked.eval(), x, y)
        model.train()
        with context:
            moved = perturb(model, near, y)
            value = F.cross_entropy(model(near), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        for w, move in moved:
            w.data.sub_(move)
        yield value.detach()


def _fast_row(images: int, **how: Any) -> Row:
    """Return the row of a training whose attack keeps the training mode."""

    def form(loss: Callable[..., Tensor]) -> Form:
        return Form(lambda model, batches, dtype: trained(model, batches, partial(loss, **how)), (loss,))

    def by_expert(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
        return trained(model, batches, partial(fast_by_expert, dtype=dtype, **how))

    return Row(
        images,
        form(fast_loss),
        Form(by_expert, (fast_by_expert, expert.fastest, best, cast)),
        form(fast_with_our_line),
        True,
    )


def _trades_frozen(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    return trained(model, batches, partial(trades_by_expert, fast=Frozen(model, dtype)))


def _trades_copied(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    fast, batches = with_copy(model, batches, dtype)
    return trained(model, batches, partial(trades_with_our_lines, fast=fast))


def tricks(model: nn.Module, batches: Batches, attacked: nn.Module, context: Any) -> Iterator[Tensor]:
    """Train on images attacked in evaluation mode, as in "Bag of Tricks for Adversarial Training" (ICLR 2021)."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        delta = attack(attacked.eval(), x, y, ALPHA, STEPS)
        model.train()
        with context:
            return F.cross_entropy(model(x + delta), y)

    return trained(model, batches, loss)


def _following_row(loop: Callable[[nn.Module, Batches, nn.Module, Any], Iterator[Tensor]]) -> Row:
    """Return the row of a training whose attack follows the model itself, or a frozen copy of it."""

    def theirs(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
        return loop(model, batches, model, contextlib.nullcontext())

    def by_expert(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
        fast = Frozen(model, dtype)
        return loop(model, batches, fast, cast(fast.dtype))

    def with_our_lines(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
        fast, batches = with_copy(model, batches, dtype)
        return loop(model, batches, fast, contextlib.nullcontext())

    expert_form = Form(by_expert, (loop, by_expert, cast, *WRITTEN))
    return Row(8, Form(theirs, (loop,)), expert_form, Form(with_our_lines, (loop, with_our_lines, copied)), True)


_TRADES = Form(lambda model, batches, dtype: trained(model, batches, trades), (trades, trades_attack))
_TRADES_BY_EXPERT = Form(_trades_frozen, (trades_by_expert, trades_attack_once, cast, *WRITTEN))
_TRADES_WITH_OURS = Form(_trades_copied, (trades_with_our_lines, trades_attack_once, copied))

#: Steps of the process, and of the attack.
TIMES, THROUGH_STEPS = 4, 2
#: Share of the image's signal that the noise leaves at the beginning of the process.
KEPT = 0.9


class Purifier(nn.Module):
    """A purifier as in DiffPure (Nie et al., ICML 2022), with the steps of DDIM."""

    def __init__(self, denoise: nn.Module, classify: nn.Module):
        super().__init__()
        self.denoise, self.classify = denoise, classify

    def step(self, x: Tensor, now: float, after: float, time: int) -> Tensor:
        """Return the state after a step from one share of signal to another."""
        noise = self.denoise(x, torch.full((len(x),), float(time)))
        image = ((x - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-1, 1)
        return after**0.5 * image + (1 - after) ** 0.5 * noise

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.linspace(KEPT, 1, TIMES + 1).tolist()
        state = KEPT**0.5 * (2 * x - 1) + (1 - KEPT) ** 0.5 * torch.randn_like(x)
        for i in range(TIMES):
            time = 100 * (TIMES - i) // TIMES
            state = checkpoint(self.step, state, shares[i], shares[i + 1], time, use_reentrant=False)
        return self.classify((state + 1) / 2)


class FrozenDenoiser(nn.Module):
    """A denoiser under autocast, with frozen weights in channels_last."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model.requires_grad_(False).to(memory_format=expert.LAST), dtype

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with cast(self.dtype):
            return self.model(x, t).float()


def purifier_attacked(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack the purifier with its exact gradient."""
    model.eval()
    for x, y in batches:
        near = x
        for _ in range(THROUGH_STEPS):
            near = near.detach().requires_grad_()
            F.cross_entropy(model(near), y, reduction="sum").backward()
            near = stepped(near.detach(), near.grad, x, ALPHA)
        yield near


def purifier_attacked_by_expert(model: Purifier, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack a purifier whose networks are frozen."""
    model.classify = Frozen(model.classify, dtype)
    model.denoise = FrozenDenoiser(model.denoise, model.classify.dtype)
    return purifier_attacked(model, batches, dtype)


def purifier_attacked_with_our_lines(model: Purifier, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack a purifier with a frozen copy of its classifier, without gradients of weights."""
    model.classify, batches = with_copy(model.classify, batches, dtype)
    with purify_fast.images_only(model):
        yield from purifier_attacked(model, batches, dtype)


def purifier(small: bool) -> nn.Module:
    """Return a purifier with random weights."""
    return Purifier(denoiser(4 if small else 32), network(small)).eval()


_DIFFUSION = Form(purifier_attacked, (purifier_attacked,))
_DIFFUSION_BY_EXPERT = Form(
    purifier_attacked_by_expert, (purifier_attacked, purifier_attacked_by_expert, FrozenDenoiser, cast, *WRITTEN)
)
_DIFFUSION_WITH_OURS = Form(
    purifier_attacked_with_our_lines, (purifier_attacked, purifier_attacked_with_our_lines, copied)
)
#: A radius at which few images fall, so that no contestant has less work than another.
TINY = 0.5 / 255
#: Where `make test` puts the last setuptools that has pkg_resources, which RobustBench imports.
PKG_RESOURCES = Path(sys.prefix) / "setuptools-80"

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def apgd_ce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by Auto-PGD with the cross-entropy, and return the points of the highest loss."""
    base = importlib.import_module("pyautoattack.autopgd_base")
    return base.APGDAttack(model, n_iter=STEPS, eps=EPS, device="cpu").perturb(x, y, best_loss=True)


def apgd_t(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by Auto-PGD with the targeted loss DLR and one target, and return the misclassified points."""
    base = importlib.import_module("pyautoattack.autopgd_base")
    return base.APGDAttack_targeted(model, n_iter=STEPS, eps=EPS, n_target_classes=1, device="cpu").perturb(x, y)


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by PGD of torchattacks."""
    return importlib.import_module("torchattacks").PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)(x, y)


def torchattacks_cw(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by the attack of Carlini and Wagner of torchattacks."""
    return importlib.import_module("torchattacks").CW(model, steps=STEPS)(x, y)


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Attack by PGD of Foolbox."""
    foolbox = importlib.import_module("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS)
    near: Tensor = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=EPS)[1]
    return near


@functools.cache
def _clean_accuracy() -> Callable[..., float]:
    """Import RobustBench's function, with the package and the folder that the import needs."""
    # RobustBench imports the name of the authors' repository, which is not in the package index.
    needed = {name: importlib.import_module(f"py{name}") for name in ("autoattack", "autoattack.state")}
    sys.modules.update(needed)
    sys.path.append(str(PKG_RESOURCES))
    try:
        return importlib.import_module("robustbench.utils").clean_accuracy
    finally:
        sys.path.remove(str(PKG_RESOURCES))
        for name in needed:
            del sys.modules[name]


def robustbench(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the accuracies as RobustBench's `benchmark` does, with two attacks of AutoAttack."""
    autoattack = importlib.import_module("pyautoattack")
    accuracy = _clean_accuracy()
    accuracy(model, x, y, batch_size=len(x))
    adversary = autoattack.AutoAttack(model, eps=TINY, norm="Linf", version="custom", attacks=["apgd-ce", "apgd-t"])
    adversary.verbose, adversary.seed = False, 0
    for part in (adversary.apgd, adversary.apgd_targeted):
        part.n_iter, part.n_restarts = STEPS, 1
    adversary.apgd_targeted.n_target_classes = 1
    near, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
    accuracy(model, near, y, batch_size=len(x))
    return near


def attacked(model: nn.Module, batches: Batches, dtype: Dtype, attack: Attack) -> Iterator[Tensor]:
    """Attack each batch."""
    model.eval()
    for x, y in batches:
        yield attack(model, x, y).detach()


def attacked_by_expert(model: nn.Module, batches: Batches, dtype: Dtype, attack: Attack) -> Iterator[Tensor]:
    """Attack a frozen copy."""
    return attacked(Frozen(model, dtype), batches, dtype, attack)


def _row(attack: Attack, package: str = "", images: int = 8) -> Row:
    theirs = Form(partial(attacked, attack=attack), (attacked,))
    by_expert = Form(partial(attacked_by_expert, attack=attack), (attacked_by_expert, attacked, *WRITTEN))
    return Row(images, theirs, by_expert, with_our_line(theirs), False, package=package)


ROWS = {
    **{f"TRADES, {n} images": Row(n, _TRADES, _TRADES_BY_EXPERT, _TRADES_WITH_OURS, True) for n in (8, 2)},
    "PGD-7 in training mode": _fast_row(8, alpha=ALPHA, steps=7),
    "FGSM with a random start": _fast_row(16, alpha=1.25 * EPS, steps=1),
    "Bag of Tricks": _following_row(tricks),
    "AWP": _following_row(awp),
    f"CARSO's classifier, {CARSO_STEPS} steps": _row(carso, images=16),
    f"diffusion, {TIMES} steps with checkpoints": Row(
        4, _DIFFUSION, _DIFFUSION_BY_EXPERT, _DIFFUSION_WITH_OURS, False, purifier, nn.Module.children
    ),
    "APGD-CE of pyautoattack": _row(apgd_ce, "pyautoattack"),
    "APGD-T of pyautoattack": _row(apgd_t, "pyautoattack"),
    "PGD of torchattacks": _row(torchattacks_pgd, "torchattacks"),
    "CW of torchattacks": _row(torchattacks_cw, "torchattacks"),
    "LinfPGD of Foolbox": _row(foolbox_pgd, "foolbox"),
    "RobustBench with AutoAttack": _row(robustbench, "robustbench"),
}
