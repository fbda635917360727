"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum, whose step is halved where it stops paying; no step to choose.

At checkpoints an image's step is halved, and its search goes on from the best point seen, if at most a share rho of the
steps since the last checkpoint raised the loss, or if the step was kept then and the best loss is still the same. The
checkpoints, 22 % of the steps and then ever closer, are rounded as in the authors' implementation. Two things are not
in the paper: the start is uniform in the ball, and a random model's loss is the mean over the draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._validation import GradientPrecision, Share
from ..protocols import Classifier
from .base import AttackContext, Radius, Run, TargetedAttack, run_alone
from .engine.auto_pgd import AutoPgd, run_from_larger
from .engine.rows import ActiveSet, Goals, Images, likeliest_wrong
from .losses import FEWEST_CLASSES, TARGETED, ApgdLoss


@dataclass(frozen=True, kw_only=True)
class APGD(TargetedAttack):
    """Auto-PGD, from a start of its own in every run; images leave the attack as soon as they have fallen.

    Args:
        loss: a name of `purify_fast.attacks.LOSSES`, or of `TARGETED`, whose losses raise one class each; "margin"
            replaces "dlr" below 3 classes and "dlr_targeted" below 4. Only a targeted loss looks at
            ``n_target_classes``.
        steps: gradient steps of a run; None: the report's.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
        leave_when_fallen: whether an image is attacked no more once the model itself, asked again, misclassifies its
            point; that point is then returned. If not, every image is attacked to the end, and as long as some draw is
            right.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "apgd"
    follows_gradients: ClassVar[bool] = True

    loss: ApgdLoss = "ce"
    rho: Share = 0.75
    leave_when_fallen: bool = True

    def name(self, context: AttackContext) -> str:
        steps, _, loss = self.decided(context)
        if loss not in TARGETED:
            return self.full_name(f"APGD-{steps} {loss}", targeted=False)
        return self.full_name(f"APGD-T {steps}" + ("" if loss == "dlr_targeted" else " margin"))

    def targets(self, context: AttackContext) -> int | None:
        return super().targets(context) if self.decided(context).loss in TARGETED else None

    def cost(self, context: AttackContext) -> int:
        steps, draws, loss = self.decided(context)
        runs = self.restarts * (self.targets(context) or 1)
        at_the_end = draws * (2 if draws > 1 else 1)
        # the clean image is judged, and classified for the losses that need to know the classes
        before = context.judges(draws) + (loss in {*FEWEST_CLASSES, *TARGETED})
        return runs * (steps * draws + at_the_end) + before

    def revision(self) -> str:
        return "5"

    def explore(self, images: Images, run: Run) -> Tensor:
        steps, _, loss = self.decided(run)
        goals = self._goals(images, loss)
        active = ActiveSet(images, leave=self.leave_when_fallen)
        by_pace = self.give_up and self.leave_when_fallen
        with self.objective(images, run, loss) as objective:
            for rows in self.waves(active, goals, run):
                if images.ball.norm == "l1":
                    run_from_larger(objective, active, rows, steps, health=run.health)
                else:
                    AutoPgd(objective, active, rows, steps, rho=self.rho, health=run.health, give_up=by_pace).run()
        return active.best

    def _goals(self, images: Images, loss: str) -> Goals:
        """The target class of each run, int64 ``[B]``, or None; ValueError for too few classes for the loss."""
        if loss not in FEWEST_CLASSES and loss not in TARGETED:
            return (None,)
        logits = images.judge.logits(images.x)
        classes, least = logits.shape[1], FEWEST_CLASSES.get(loss, 2)
        if classes < least:
            raise ValueError(f"the {loss} loss needs at least {least} classes, got {classes}: use 'margin'")
        return likeliest_wrong(logits, images.y, self.n_target_classes) if loss in TARGETED else (None,)


def apgd(
    model: Classifier, x: Tensor, y: Tensor, *, eps: Radius, precision: GradientPrecision = "float32", **options: Any
) -> Tensor:
    """Auto-PGD from random starts; with ``dlr_targeted``, towards one class after the other.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``.
        precision: what gradients are computed in; "bfloat16" and "auto" take them from a copy, while every success is
            judged by the model itself (see `purify_fast.attacks.engine.gradient_copy`).
        **options: of `APGD`, such as ``loss``, ``n_target_classes`` and ``restarts``, and of `Run`, such as ``norm``,
            ``steps`` (100), ``seed``, ``max_forward_batch`` and ``graphs``.

    Returns:
        Per image the best point seen: misclassified (in most draws), then of highest loss. Shape and dtype of x, within
        eps of x and within [clip_min, clip_max], up to the rounding of x's dtype.

    Raises:
        TypeError: x or y is no tensor, or there is no such option.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name, count or range, or too few classes for the loss; or a model
            that writes to its input.
    """
    return run_alone(APGD, model, x, y, eps=eps, precision=precision, **options)
