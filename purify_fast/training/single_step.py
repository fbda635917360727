"""Attacks that need one gradient: N-FGSM, and the attack and regularizer of nuclear norm training (NuAT).

The model is in evaluation mode during the attack, as in every attack of this package. The authors' code of N-FGSM
attacks the model in training mode (github.com/pdejorge/N-FGSM, commit 0a9e4f0, train.py lines 201 to 237). The authors'
code of NuAT attacks the model in evaluation mode, but computes the clean logits in training mode
(github.com/val-iisc/NuAT, commit 8962290, CIFAR10/NuAT_cifar10.py lines 207 to 222).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks import frozen
from ..attacks.ball import ball_around, sample_in_ball
from ..ops.pgd_step import pgd_step
from ..protocols import Classifier
from .config import TrainingAttack
from .task import Batch

#: Radius of N-FGSM's uniform noise, in multiples of eps ("k" in the paper).
NOISE = 2.0
#: The attack of NuAT begins at a random corner of an L-inf ball with this radius, in multiples of eps.
CORNER = 0.5


def n_fgsm(model: Classifier, batch: Batch, attack: TrainingAttack) -> Tensor:
    """Make adversarial images with N-FGSM (de Jorge et al., NeurIPS 2022, Algorithm 1).

    The attack adds uniform noise of radius 2 eps, and then takes one signed gradient step of length alpha. The result
    may be up to ``2 eps + alpha`` away from the image, because it is not projected onto the ball.

    Args:
        model: images to logits.
        batch: the images ``[B, C, H, W]``, and the seed and sample ids of the noise.
        attack: eps, and alpha, the length of the step; if alpha is None, the step has length eps.

    Returns:
        The adversarial images ``[B, C, H, W]``.
    """
    now = attack.at_epoch(batch.epoch, batch.epochs)
    alpha = now.eps if now.alpha is None else now.alpha
    x, farthest = batch.x, NOISE * now.eps + alpha
    point = sample_in_ball(x, ball_around(x, NOISE * now.eps), seed=batch.seed, sample_ids=batch.sample_ids)
    with frozen(model):
        gradient = _gradient(point, lambda moved: F.cross_entropy(model(moved), batch.y, reduction="sum"))
    # this ball contains every result, so pgd_step only clamps the pixels to [0, 1]
    return pgd_step(point, gradient, x, alpha, min(farthest, 1.0), lo=0.0, hi=1.0)


def nuclear_step(model: Classifier, batch: Batch, attack: TrainingAttack, weight: float) -> Tensor:
    """Make adversarial images with the attack of NuAT (Sriramanan et al., NeurIPS 2021; the authors' lines 102 to 220).

    The attack begins at a random corner of the ball of radius eps / 2, takes one signed gradient step of length alpha,
    and projects the result onto the ball of radius eps. The attacked loss is cross-entropy. In every second step of the
    training, the weighted nuclear norm of the change of the logits is added to the attacked loss.

    Args:
        model: images to logits.
        batch: the images ``[B, C, H, W]``, and the seed and sample ids of the corner.
        attack: eps, and alpha, the length of the step; if alpha is None, the step has length eps.
        weight: weight of the nuclear norm.

    Returns:
        The adversarial images ``[B, C, H, W]``.
    """
    now = attack.at_epoch(batch.epoch, batch.epochs)
    alpha = now.eps if now.alpha is None else now.alpha
    x, y, with_norm = batch.x, batch.y, batch.step % 2 == 1 and weight > 0
    inside = sample_in_ball(x, ball_around(x, now.eps), seed=batch.seed, sample_ids=batch.sample_ids)
    # a pixel at 0 or 1 whose noise points out of [0, 1] has the sign 0, and does not change
    corner = (x + CORNER * now.eps * (inside - x).sign()).clamp(0, 1)
    with frozen(model):
        with torch.no_grad():
            clean = model(x) if with_norm else None

        def loss(moved: Tensor) -> Tensor:
            logits = model(moved)
            total = F.cross_entropy(logits, y)
            return total if clean is None else total + weight * nuclear_norm(logits - clean)

        gradient = _gradient(corner, loss)
    return pgd_step(corner, gradient, x, alpha, now.eps, lo=0.0, hi=1.0)


def nuclear_norm(change: Tensor) -> Tensor:
    """Return the nuclear norm (sum of singular values) of a change of logits ``[B, classes]``, divided by B; scalar."""
    # PyTorch cannot compute singular values in 16 bits, and they would be too inexact
    with torch.autocast(change.device.type, enabled=False):
        return torch.linalg.matrix_norm(change.float(), ord="nuc") / len(change)


def _gradient(point: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        moved = point.detach().requires_grad_()
        return torch.autograd.grad(loss(moved), moved)[0]
