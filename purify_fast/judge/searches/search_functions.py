"""The attacks that only judge, as functions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..._validation import NormName
from ...attacks.base import untraced
from ...attacks.context import AttackContext, LossFunction, Radius, chosen_seed
from ...attacks.functions import goal
from ...attacks.losses import ApgdLoss, Loss
from ...protocols import Classifier
from .apgd import APGD
from .engine.engine_attack import USUAL_TARGETS
from .fab import FABT, STEPS
from .square import QUERIES, Square
from .stadv import EPS, RATE, TAU, StAdv


@untraced
def apgd(
    model: Classifier,
    x: Tensor,
    y: Tensor | None,
    eps: Radius,
    *,
    norm: NormName = "linf",
    steps: int = 100,
    loss: ApgdLoss | LossFunction = "ce",
    n_target_classes: int | None = USUAL_TARGETS,
    targeted: Tensor | None = None,
    restarts: int = 1,
    rho: float = 0.75,
    eot_iter: int = 1,
    leave_when_fallen: bool = True,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Run `APGD` on a batch, in the model's own precision.

    The arguments are explained at `purify_fast.attacks.pgd` or at `APGD`, and so are the errors. eps is a number or
    ``[B]``. The length of a step begins at 2 * eps (l1: eps), and then adapts itself.

    Returns:
        Per image the point that the most draws misclassify; among equal points, the point of highest loss. Shape and
        dtype are those of x.
    """
    y, function = goal(x, y, loss, targeted)
    attack = APGD(steps=steps, n_target_classes=n_target_classes, restarts=restarts, rho=rho, eot_iter=eot_iter)
    attack = replace(attack, loss="ce" if callable(loss) else loss, leave_when_fallen=leave_when_fallen)
    context = AttackContext(eps=eps, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=chosen_seed(seed))
    context = replace(context, loss_function=function, toward=targeted is not None)
    return attack.run(model, x, y, context).images


@untraced
def fab_t(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    eps: Radius,
    *,
    norm: NormName = "linf",
    steps: int = STEPS,
    n_target_classes: int | None = USUAL_TARGETS,
    restarts: int = 1,
    eot_iter: int = 1,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Run `FABT` on a batch, in the model's own precision.

    The arguments are explained at `purify_fast.attacks.pgd` or at `FABT`, and so are the errors. eps is a number or
    ``[B]``.

    Returns:
        Per image the misclassified point in the ball that was found; otherwise the nearest misclassified point,
        projected onto the ball, or the image itself. Shape and dtype are those of x.
    """
    attack = FABT(steps=steps, n_target_classes=n_target_classes, restarts=restarts, eot_iter=eot_iter)
    return attack(model, x, y, eps, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=seed)


@untraced
def square(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    eps: Radius,
    *,
    norm: NormName = "linf",
    n_queries: int = QUERIES,
    restarts: int = 1,
    eot_iter: int = 1,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Run `Square` on a batch, in the model's own precision.

    The arguments are explained at `purify_fast.attacks.pgd` or at `Square`, and so are the errors. eps is a number or
    ``[B]``.

    Returns:
        Per image the misclassified point that was found, otherwise the point of the highest margin. Shape
        and dtype are those of x.
    """
    attack = Square(n_queries=n_queries, restarts=restarts, eot_iter=eot_iter)
    return attack(model, x, y, eps, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=seed)


@untraced
def stadv(
    model: Classifier,
    x: Tensor,
    y: Tensor | None,
    eps: float | Tensor = EPS,
    *,
    steps: int = 20,
    loss: Loss = "margin",
    targeted: Tensor | None = None,
    random_start: bool = False,
    keep_best: bool = False,
    restarts: int = 1,
    rate: float = RATE,
    smoothness: float = TAU,
    eot_iter: int = 1,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Run `StAdv` on a batch.

    The arguments are explained at `purify_fast.attacks.pgd` or at `StAdv`, and so are the errors. eps is the largest
    flow along each axis, in units of half the image, a number or ``[B]``.

    Returns:
        Per image the last point, or the best point with ``keep_best=True``. Shape and dtype are those of x.
    """
    y, _ = goal(x, y, loss, targeted)
    attack = StAdv(eps=eps, steps=steps, loss=loss, rate=rate, smoothness=smoothness, eot_iter=eot_iter)
    attack = replace(attack, random_start=random_start, keep_best=keep_best, restarts=restarts)
    return attack.run(model, x, y, AttackContext(seed=chosen_seed(seed), toward=targeted is not None)).images
