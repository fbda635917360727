"""Adversarial trainings: TRADES, PGD and FGSM in training mode, and adversarial weight perturbation (AWP)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import purify_fast

from ..pipelines import expert
from . import ALPHA, EPS, Batches, Dtype, Form, Row, with_our_line
from .attack_loops import pgd, stepped
from .expert_changes import WRITTEN, Frozen, best, cast, fastest

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


def trades_attack_by_expert(model: nn.Module, x: Tensor) -> Tensor:
    """Do the same as `trades_attack`, and compute the constant target once."""
    model.eval()
    near = x + 0.001 * torch.randn_like(x)
    with torch.no_grad():
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
    near = trades_attack_by_expert(fast, x)
    with cast(fast.dtype):
        return trades_loss(model, x, y, near)


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
    """Train by adversarial weight perturbation (Wu et al., NeurIPS 2020), with PGD in evaluation mode.

    Args:
        model: trained model.
        batches: images and labels.
        attacked: the model itself, or its frozen copy.
        context: context of the forward passes in training mode.
    """
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


def awp_by_expert(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Train by adversarial weight perturbation, whose attack runs on a frozen copy."""
    fast = Frozen(model, dtype)
    return awp(model, batches, fast, cast(fast.dtype))


def _fast_row(images: int, **how: Any) -> Row:
    """Return the row of a training whose attack keeps the training mode."""

    def form(loss: Callable[..., Tensor]) -> Form:
        return Form(lambda model, batches, dtype: trained(model, batches, partial(loss, **how)), (loss,))

    def by_expert(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
        return trained(model, batches, partial(fast_by_expert, dtype=dtype, **how))

    return Row(
        images, form(fast_loss), Form(by_expert, (fast_by_expert, fastest, best, cast)), form(fast_with_our_line), True
    )


def _trades_frozen(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    return trained(model, batches, partial(trades_by_expert, fast=Frozen(model, dtype)))


_TRADES = Form(lambda model, batches, dtype: trained(model, batches, trades), (trades, trades_attack))
_TRADES_BY_EXPERT = Form(_trades_frozen, (trades_by_expert, trades_attack_by_expert, cast, *WRITTEN))
_AWP = Form(lambda model, batches, dtype: awp(model, batches, model, contextlib.nullcontext()), (awp,))
_AWP_BY_EXPERT = Form(awp_by_expert, (awp, awp_by_expert, cast, *WRITTEN))

ROWS = {
    **{f"TRADES, {n} images": Row(n, _TRADES, _TRADES_BY_EXPERT, with_our_line(_TRADES), True) for n in (8, 2)},
    "PGD-7 in training mode": _fast_row(8, alpha=ALPHA, steps=7),
    "FGSM with a random start": _fast_row(16, alpha=1.25 * EPS, steps=1),
    "AWP": Row(8, _AWP, _AWP_BY_EXPERT, with_our_line(_AWP), True),
}
