"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum, whose step is halved where it stops paying; no step to choose.

At checkpoints an image's step is halved, and its search goes on from the best point seen, if at most a share rho of the
steps since the last checkpoint raised the loss, or if the step was kept then and the best loss is still the same. The
checkpoints, 22 % of the steps and then ever closer, are rounded as in the authors' implementation. Two things are not
in the paper: the start is uniform in the ball, and a random model's loss is the mean over the draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._validation import check_literal
from ..protocols import Classifier
from ..speed.step_graphs import StepGraphs
from .arguments import Fallen, NormName, Precision, check_at_least_one, check_images, check_switch
from .ball import ball_around
from .base import AttackContext, TargetedAttack
from .draws import Objective, drawn_once_per_call
from .engine.active_set import ActiveSet
from .engine.auto_pgd import run, run_from_larger
from .engine.gradient_copy import COMPARED, GradientCopies, gradient_copy
from .engine.judge import Judge
from .engine.step_size import Schedule
from .engine.waves import Waves, add_counts, likeliest_wrong
from .frozen_model import frozen
from .health import GradientHealth
from .losses import FEWEST_CLASSES, TARGETED, ApgdLoss, usable_loss


def apgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 100,
    norm: NormName = "linf",
    loss: ApgdLoss = "ce",
    target: Tensor | None = None,
    n_target_classes: int | None = 9,
    eot_iter: int = 1,
    restarts: int = 1,
    rho: float = 0.75,
    leave_when_fallen: bool = True,
    give_up: bool = False,
    fallen: Fallen = "all",
    judge_draws: int | None = None,
    precision: Precision = "float32",
    copies: GradientCopies | None = None,
    gradients_from: Classifier | None = None,
    most_rows: int | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_forward_batch: int | None = None,
    health: GradientHealth | None = None,
    graphs: StepGraphs | None = None,
    found: dict[str, int] | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> Tensor:
    """Auto-PGD from random starts; with ``dlr_targeted``, towards one class after the other.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``.
        steps: gradient steps of a run.
        norm: "linf", "l2" or "l1". In the l1 ball steps are sparse (Croce & Hein, "Mind the box", ICML 2021).
        loss: a name of `purify_fast.attacks.LOSSES`, or of `TARGETED`, whose losses raise one class each.
        target: int64 ``[B]``, the class that a targeted loss raises. None: the ``n_target_classes`` wrong classes of
            highest logit on x, one run each.
        n_target_classes: wrong classes that a targeted loss tries; None, or more than there are: all of them.
        eot_iter: draws of a random model averaged per step: in one batch, or each in a call of its own where the model
            draws once per call.
        restarts: runs (for each target), each from a start of its own. Only images that have not fallen get another
            run.
        rho: the share of the steps that must raise the loss for the step to stay.
        leave_when_fallen: whether an image is attacked no more once the model itself, asked again, misclassifies its
            point, by the share of draws that ``fallen`` asks for; that point is then returned. If not, every image is
            attacked to the end, and as long as some draw is right.
        give_up: whether a run ends for an image whose loss would not reach its value at the border even at eight times
            its recent pace; decided after 40, 60 and 80 % of the steps, in runs of 50 steps or more. With "ce" that
            value is log 2, below which no image is misclassified. Not in the l1 ball, where images that have fallen
            stay, or where an image falls by fewer than all draws.
        fallen: of a random model, by which share of fresh draws an image falls: "any", "majority" or "all".
        judge_draws: fresh draws for that; None: as many as ``eot_iter``.
        precision: what gradients are computed in; "bfloat16" and "auto" take them from a copy, while every success is
            judged by the model itself (see `purify_fast.attacks.engine.gradient_copy`).
        copies: keeps such a copy for the next attack, if given.
        gradients_from: another model, whose gradients are followed; None: the model's own, or its copy's.
        most_rows: searches at once, where several targets or restarts of an image are tried together; None: 64, or as
            many as there are images, if those are more.
        seed: of the random starts.
        sample_ids: int64 ``[B]``; an image's random start depends on the seed and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most; exact. None: no limit.
        health: counts gradients and, in every run, movement, if given.
        graphs: on a CUDA device, captures what a step asks of the model, as of `pgd`; one graph for each batch size.
        found: to the name of each target and restart is added how many images fell to it, if given.
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.

    Returns:
        Per image the best point seen: misclassified (in most draws), then of highest loss. Shape and dtype of x, within
        eps of x and within [clip_min, clip_max], up to the rounding of x's dtype.

    Raises:
        TypeError: x or y is no tensor.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name, count or range, or too few classes for the loss; or a model
            that writes to its input.
    """
    check_images(x, y, clip_min, clip_max)
    ball = ball_around(x, eps, norm, clip_min, clip_max)
    _check_modes(loss, fallen, precision, give_up)
    check_at_least_one(steps=steps, eot_iter=eot_iter, max_forward_batch=max_forward_batch, restarts=restarts)
    check_at_least_one(n_target_classes=n_target_classes, judge_draws=judge_draws, most_rows=most_rows)
    _check_rho(rho)
    _check_target(target, y, loss)
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach().clone()
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    judges = judge_draws or eot_iter
    with frozen(model):
        apart = drawn_once_per_call(model, x, max(judges, eot_iter), max_forward_batch)
        judge = Judge(model, fallen, judges, max_forward_batch, apart)
        goals = _goals(judge, x, y, loss, target=target, count=n_target_classes)
        active = ActiveSet(x, y, judge, leave=leave_when_fallen)
        source = gradient_copy(model, x[:COMPARED], precision, copies) if gradients_from is None else gradients_from
        by_pace = give_up and leave_when_fallen and (fallen == "all" or judge.draws == 1)
        attack = run_from_larger if ball.norm == "l1" else partial(run, give_up=by_pace)
        waves = Waves(x, y, ball, goals, restarts, seed=seed, ids=ids, most=most_rows)
        with frozen(source):
            apart = apart if gradients_from is None else drawn_once_per_call(source, x, eot_iter, max_forward_batch)
            objective = Objective(source, loss, eot_iter, max_forward_batch, graphs, apart=apart)
            for rows in waves.over(active):
                attack(objective, active, rows, Schedule(steps, rho), health=health)
    if found is not None:
        add_counts(found, waves.counted(active))
    return active.found


def _check_modes(loss: str, fallen: str, precision: str, give_up: bool) -> None:
    check_switch("give_up", give_up)
    check_literal("loss", loss, ApgdLoss)
    check_literal("fallen", fallen, Fallen)
    check_literal("precision", precision, Precision)


def _check_rho(rho: float) -> None:
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")


def _check_target(target: Tensor | None, y: Tensor, loss: str) -> None:
    if target is None:
        return
    if loss not in TARGETED:
        raise ValueError(f"a target needs the loss {', '.join(TARGETED)}, got {loss!r}")
    if target.shape != y.shape or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [B] = [{len(y)}], got {target.dtype} {list(target.shape)}")
    if bool((target == y).any()):
        raise ValueError("target must differ from y for every image")


def _goals(
    judge: Judge, x: Tensor, y: Tensor, loss: str, *, target: Tensor | None, count: int | None
) -> tuple[Tensor | None, ...]:
    """The target class of each run, int64 ``[B]``; None for a loss without a target.

    Raises:
        ValueError: a target that is no class, or too few classes for the loss.
    """
    if loss not in FEWEST_CLASSES and loss not in TARGETED:
        return (None,)
    logits = judge.logits(x)
    classes, least = logits.shape[1], FEWEST_CLASSES.get(loss, 2)
    if classes < least:
        raise ValueError(f"the {loss} loss needs at least {least} classes, got {classes}: use 'margin'")
    if loss not in TARGETED:
        return (None,)
    if target is None:
        return likeliest_wrong(logits, y, count)
    if bool(((target < 0) | (target >= classes)).any()):
        raise ValueError(f"target must be in 0 .. {classes - 1}, got {target.min()} .. {target.max()}")
    return (target,)


@dataclass(frozen=True, kw_only=True)
class APGD(TargetedAttack):
    """Auto-PGD, as a row of an evaluation; images leave the attack as soon as they have fallen.

    Args:
        loss: a name of `purify_fast.attacks.LOSSES` or `TARGETED`; "margin" replaces "dlr" below 3 classes and
            "dlr_targeted" below 4. Only a targeted loss looks at ``n_target_classes``.
        steps: gradient steps of a run; None: the report's.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "apgd"
    follows_gradients: ClassVar[bool] = True

    loss: ApgdLoss = "ce"
    rho: float = 0.75

    def __post_init__(self) -> None:
        check_literal("loss", self.loss, ApgdLoss)
        _check_rho(self.rho)
        super().__post_init__()

    def name(self, context: AttackContext) -> str:
        loss, steps = usable_loss(self.loss, context.num_classes), self.steps or context.steps
        name = f"APGD-{steps} {loss}"
        if loss in TARGETED:
            name = self.with_targets(f"APGD-T {steps}" + ("" if loss == "dlr_targeted" else " margin"))
        return self.with_restarts(name)

    def target_classes(self, context: AttackContext) -> int | None:
        """How many wrong classes are tried; None for a loss without a target."""
        targeted = usable_loss(self.loss, context.num_classes) in TARGETED
        return self.targets(context.num_classes) if targeted else None

    def cost(self, context: AttackContext) -> int:
        draws = self.draws(context)
        runs = self.restarts * (self.target_classes(context) or 1)
        at_the_end = draws * (2 if draws > 1 else 1)
        # the clean image is judged, and classified for the losses that need to know the classes
        before = context.judges + (usable_loss(self.loss, context.num_classes) in {*FEWEST_CLASSES, *TARGETED})
        return runs * ((self.steps or context.steps) * draws + at_the_end) + before

    def settings(self, context: AttackContext) -> dict[str, Any]:
        loss, steps = usable_loss(self.loss, context.num_classes), self.steps or context.steps
        own = {"loss": loss, "steps": steps, "n_target_classes": self.target_classes(context)}
        return super().settings(context) | own

    def revision(self) -> str:
        return "5"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        options = self.options(context) | {"gradients_from": context.gradients_from, "graphs": context.graphs}
        loss, steps = usable_loss(self.loss, context.num_classes), self.steps or context.steps
        return apgd(target, x, y, loss=loss, steps=steps, rho=self.rho, **options)
