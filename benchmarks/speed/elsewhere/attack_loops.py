"""Attacks by PGD in evaluation mode: the attack of trainings, and that of CARSO's training on a frozen classifier."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ALPHA, EPS, Batches, Dtype, Form, Row, with_our_line
from .expert_changes import WRITTEN, Frozen

#: Steps of the attack in trainings. CARSO takes 40 steps, of which a row measures some.
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


def carso(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack a classifier whose weights are not trained, as a training of CARSO does (Ballarin et al., 2023)."""
    model.eval().requires_grad_(False)
    for x, y in batches:
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        for _ in range(CARSO_STEPS):
            delta.requires_grad_()
            F.cross_entropy(model(x + delta), y, reduction="sum").backward()
            delta = stepped(x + delta.detach(), delta.grad, x, ALPHA) - x
        yield x + delta


def carso_by_expert(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack a frozen copy of the classifier."""
    return carso(Frozen(model, dtype), batches, dtype)


_CARSO = Form(carso, (carso,))
_BY_EXPERT = Form(carso_by_expert, (carso_by_expert, carso, *WRITTEN))

ROWS = {f"CARSO's classifier, {CARSO_STEPS} steps": Row(16, _CARSO, _BY_EXPERT, with_our_line(_CARSO), False)}
