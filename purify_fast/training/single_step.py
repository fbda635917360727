"""Adversarial images by one gradient: N-FGSM, and the attack and the regularizer of nuclear norm training.

The model is attacked in evaluation mode, as by every attack of this package. The authors' code of N-FGSM attacks it in
training mode (github.com/pdejorge/N-FGSM, commit 0a9e4f0, train.py lines 201 to 237), that of NuAT in evaluation mode,
but for the clean logits (github.com/val-iisc/NuAT, commit 8962290, CIFAR10/NuAT_cifar10.py lines 207 to 222).
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

#: The radius of the ball of N-FGSM's uniform noise, in multiples of eps ("k" in the paper).
NOISE = 2.0
#: The radius of the ball at whose corner NuAT begins, in multiples of eps.
CORNER = 0.5


def n_fgsm(model: Classifier, batch: Batch, attack: TrainingAttack) -> Tensor:
    """Fast gradient sign from a noisy image, without projection (de Jorge et al., NeurIPS 2022, Algorithm 1).

    Noise that is uniform in twice the ball is added, then one signed step of alpha is taken. The result may be up to
    ``2 eps + alpha`` away from the image, and is not brought back into the ball.

    Args:
        model: images to logits.
        batch: the images ``[B, C, H, W]``, and the seed and sample ids of the noise.
        attack: eps, and the length of the step; without an alpha it is eps.

    Returns:
        The adversarial images ``[B, C, H, W]``.
    """
    now = attack.at_epoch(batch.epoch, batch.epochs)
    alpha = now.eps if now.alpha is None else now.alpha
    x, farthest = batch.x, NOISE * now.eps + alpha
    point = sample_in_ball(x, ball_around(x, NOISE * now.eps), seed=batch.seed, sample_ids=batch.sample_ids)
    with frozen(model):
        gradient = _gradient(point, lambda moved: F.cross_entropy(model(moved), batch.y, reduction="sum"))
    # this ball contains every result, so that the step only projects onto the pixels' range
    return pgd_step(point, gradient, x, alpha, min(farthest, 1.0), lo=0.0, hi=1.0)


def nuclear_step(model: Classifier, batch: Batch, attack: TrainingAttack, weight: float) -> Tensor:
    """The attack of nuclear norm adversarial training (Sriramanan et al., NeurIPS 2021; the authors' lines 102 to 220).

    From a random corner of half the ball the attack takes a signed step of eps, and projects it onto the ball. In every
    other step of the training the loss has the nuclear norm of the change of the logits; in the steps between it is
    cross-entropy alone.

    Args:
        model: images to logits.
        batch: the images ``[B, C, H, W]``, and the seed and sample ids of the corner.
        attack: eps, and the length of the step; without an alpha it is eps.
        weight: weight of the nuclear norm.

    Returns:
        The adversarial images ``[B, C, H, W]``.
    """
    now = attack.at_epoch(batch.epoch, batch.epochs)
    alpha = now.eps if now.alpha is None else now.alpha
    x, y, with_norm = batch.x, batch.y, batch.step % 2 == 1 and weight > 0
    inside = sample_in_ball(x, ball_around(x, now.eps), seed=batch.seed, sample_ids=batch.sample_ids)
    # a pixel at the border of its range whose noise points outwards stays where it is
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
    """The sum of the singular values of what a batch's logits change, ``[B, classes]``, divided by B; a scalar."""
    # PyTorch has no singular values in half precision, which would be too coarse for them
    with torch.autocast(change.device.type, enabled=False):
        return torch.linalg.matrix_norm(change.float(), ord="nuc") / len(change)


def _gradient(point: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        moved = point.detach().requires_grad_()
        return torch.autograd.grad(loss(moved), moved)[0]
