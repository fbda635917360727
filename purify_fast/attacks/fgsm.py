"""FGSM, the fast gradient (sign) method (Goodfellow et al., ICLR 2015), alone and with PGD in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._validation import Norm, check_literal
from ..ops.pgd_step import per_sample
from ..protocols import Classifier
from ..speed.graphs.step_graphs import StepGraphs
from .arguments import NormName, check_at_least_one, check_images, check_not_negative
from .ball import ball_around, sample_in_ball
from .base import AttackContext, BallAttack, Radius, run_alone
from .frozen_model import frozen
from .losses import Loss
from .objective import Objective
from .pgd import DENSITY, PGD, ascend


@dataclass(frozen=True, kw_only=True)
class FGSM(BallAttack):
    """One step of length eps from the image itself.

    Args:
        loss: "ce", "margin", "scaled_margin" or "dlr", which below 3 classes becomes "margin".
        eot_iter: draws of a random model averaged; None: the report's.
        eps: radius of another ball than the report's, in image units; None: the report's.
        norm: norm of another ball than the report's: "linf", "l2" or "l1"; None: the report's. It needs an eps.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "fgsm"

    loss: Loss = "ce"
    eot_iter: int | None = None
    eps: float | None = None
    norm: Norm | None = None

    def __post_init__(self) -> None:
        check_literal("loss", self.loss, Loss)
        check_at_least_one(eot_iter=self.eot_iter)
        self.check_ball()

    def name(self, context: AttackContext) -> str:
        return f"FGSM {self.decided(context).loss}"

    def cost(self, context: AttackContext) -> int:
        # the gradient's draws, and the clean image, whose prediction health needs
        return self.draws(context) + 1

    def revision(self) -> str:
        return "2"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        step = context.eps if self.eps is None else self.eps
        own: dict[str, Any] = {"loss": self.loss, "eot_iter": self.eot_iter, "eps": self.eps, "norm": self.norm}
        one = PGD(steps=1, alpha=step, random_start=False, keep_best=False, **own)
        return one.search(target, x, y, context)


def fgsm(model: Classifier, x: Tensor, y: Tensor, *, eps: Radius, **options: Any) -> Tensor:
    """One step of length eps from the image itself.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius and step in image units, a number or ``[B]``.
        **options: of `FGSM`, and of `Run`, such as ``norm``, ``max_forward_batch``, ``health`` and ``graphs``.

    Returns:
        Adversarial images, as of `pgd`.

    Raises:
        TypeError: x or y is no tensor, or there is no such option.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: as `pgd`.
    """
    return run_alone(FGSM, model, x, y, eps=eps, **options)


def pgd_and_fgsm(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: Tensor,
    alpha: float | Tensor,
    steps: int,
    norm: NormName = "linf",
    seed: int = 0,
    sample_ids: Tensor | None = None,
    graphs: StepGraphs | None = None,
) -> Tensor:
    """PGD from random starts on the first half of the images, FGSM on the second, sharing the first gradient pass.

    Both raise the cross-entropy.

    The same as one call of `pgd` for the first half and one of `fgsm` for the second, to the bit where the model's
    arithmetic does not depend on the size of the batch.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[2 B, ...]`` in [0, 1].
        y: true labels, int64 ``[2 B]``.
        eps: radius in image units, ``[2 B]``.
        alpha: PGD's constant step in image units, a number or ``[B]``.
        steps: PGD's steps.
        norm: "linf", "l2" or "l1".
        seed: of PGD's random starts.
        sample_ids: int64 ``[2 B]``, as of `pgd`; the first half is used. None: 0 .. B - 1.
        graphs: captures the steps, as of `pgd`.

    Returns:
        The adversarial images, shape and dtype of x.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: an odd number of images, or as `pgd`.
    """
    check_images(x, y, 0.0)
    ball = ball_around(x, eps, norm)
    check_at_least_one(steps=steps)
    check_not_negative(alpha=alpha)
    half = len(x) // 2
    if len(x) != 2 * half:
        raise ValueError(f"x must hold an even number of images, PGD's and FGSM's, got {len(x)}")
    if half == 0:
        return x.clone()
    x = x.detach().clone()
    first = slice(half)
    clean, labels, ids, inner = x[first], y[first], None if sample_ids is None else sample_ids[first], ball.take(first)
    step = per_sample("alpha", alpha, clean)
    objective = Objective(model, graphs=graphs)
    with frozen(model):
        begin = torch.cat([sample_in_ball(clean, inner, seed=seed, sample_ids=ids), x[half:]])
        both = {"point": begin, "x": x, "y": y, "alpha": torch.cat([step, ball.eps[half:]])}
        moved = ascend(objective, ball, both, steps=1, density=DENSITY)["point"]
        point = moved[:half]
        if steps > 1:
            alone = {"point": point, "x": clean, "y": labels, "alpha": step}
            point = ascend(objective, inner, alone, steps=steps, first=1)["point"]
    return torch.cat([point, moved[half:]])
