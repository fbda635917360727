"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum and an automatic step size.

Two things are not in the paper: the first point is uniform in the ball, and the loss of a random model is the mean over
several draws.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._tensors import per_image
from ..._validation import Count, Share
from ...attacks.ball import projected
from ...attacks.base import Resolved, times
from ...attacks.context import AttackContext, keeping
from ...attacks.losses import FEWEST_CLASSES, TARGETED, ApgdLoss, check_classes
from ...attacks.objective import Gradients, Objective
from ...attacks.search import better_of, zero_is_no_fault
from ...ops.apgd_step import apgd_step
from .engine.engine_attack import USUAL_TARGETS, EngineAttack, nearest_borders, targets_and_times
from .engine.row_batches import ActiveSet, Rows, RowSearch, waves
from .judge_context import JudgeContext

#: A run on a random model ends if the gradients of this number of its first draws are all useless.
BLIND_DRAWS = 20
#: The paper's alpha. A move is alpha times the new step plus (1 - alpha) times the last move.
MOMENTUM = 0.75
#: A run in the l1 ball searches three balls in turn. LARGER: their radii, as multiples of the given radius.
#: LARGER_STEPS: the share of the steps in each of them.
LARGER, LARGER_STEPS = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)
#: Constants for the l1 ball (Croce & Hein, "Mind the box", ICML 2021). FIRST_SHARE: the share of the coordinates that
#: the first steps move, if `AutoPgdL1` is not given another share. SPARSER: at a checkpoint, the share of the
#: coordinates in which the point of highest loss differs from the image is divided by SPARSER; the next steps move the
#: resulting share. SHRINK: a checkpoint divides the step size by SHRINK. SHORTEST: the smallest step size is eps
#: divided by SHORTEST.
FIRST_SHARE, SPARSER, SHRINK, SHORTEST = 0.2, 1.5, 1.5, 10.0
#: If the changed coordinates fall below this share of those at the last checkpoint, the step size is eps again.
FEWER = 0.95


@dataclass(frozen=True, kw_only=True)
class APGD(EngineAttack):
    """Auto-PGD; every run begins at another random point.

    Args:
        steps: number of gradient steps of a run. None takes the evaluation's number, or 100 without an evaluation.
        n_target_classes: number of target classes of a targeted loss, each with a run of its own: the classes with the
            nearest decision boundaries, by the model's linear approximation at the image. None takes all wrong classes.
        loss: a name of `purify_fast.attacks.losses.LOSSES`, or of `TARGETED` for a targeted attack. If the model has
            too few classes, "margin" replaces "dlr" (fewer than 3) and "dlr_targeted" (fewer than 4).
        rho: a checkpoint halves an image's step size if at most this share of the steps since the last checkpoint
            raised the loss.
        leave_when_fallen: whether the attack of an image ends at a misclassified point that the model itself has
            confirmed. If not, every run takes all of its steps, and a further run leaves out an image only if all draws
            misclassify its best point.
    """

    kind: ClassVar[str] = "apgd"
    code_version: ClassVar[str] = "8"
    follows_gradients: ClassVar[bool] = True

    steps: Count | None = None
    n_target_classes: Count | None = USUAL_TARGETS
    loss: ApgdLoss = "ce"
    rho: Share = 0.75
    leave_when_fallen: bool = True

    def name(self, context: AttackContext) -> str:
        steps, _, loss, targets = self.resolved_for(context)
        if targets is None:
            return f"APGD-{steps} {loss}" + times(self.restarts)
        margin = "" if loss == "dlr_targeted" else " margin"
        return f"APGD-T {steps}{margin}" + targets_and_times(self.n_target_classes, self.restarts)

    def resolved_for(self, context: AttackContext) -> Resolved:
        resolved = super().resolved_for(context)
        return resolved if resolved.loss in TARGETED else resolved._replace(n_target_classes=None)

    def may_end_early(self, context: AttackContext) -> bool:
        return super().may_end_early(context) and self.threat_model(context).norm != "l1"

    def explore(self, active: ActiveSet, objective: Objective, context: JudgeContext) -> None:
        steps, loss = self.resolved_for(context).steps, objective.loss
        if loss in FEWEST_CLASSES:
            check_classes(loss, active.logits.shape[1])
        # A loss without targets needs no target classes, so the only element of `goals` is None.
        goals = nearest_borders(active, objective, self.n_target_classes) if loss in TARGETED else (None,)
        by_pace = self.give_up and self.leave_when_fallen
        for rows in waves(active, goals, self.restarts, context):
            if active.ball.norm == "l1":
                run_from_larger(objective, active, rows, steps)
            else:
                search = AutoPgd(objective, active, rows, steps, rho=self.rho, give_up=by_pace)
                with keeping(search.keep):
                    search.run()


def checkpoints(steps: int) -> dict[int, int]:
    """Return, for the step of each checkpoint, the number of steps since the checkpoint before, rounded as by the
    authors.

    The first interval has 22 % of the steps. Each further interval is shorter by 3 % of the steps, down to 6 %.
    """
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, at = {}, length
    while at < steps:
        marks[at] = length
        length = max(length - less, least)
        at += length
    return marks


def checkpoints_l1(steps: int) -> dict[int, int]:
    """Return the checkpoints for the l1 ball, in the form of `checkpoints`; they come after every 4 % of the steps."""
    length = max(int(0.04 * steps), 1)
    return dict.fromkeys(range(length, steps, length), length)


def changed_share(point: Tensor, x: Tensor) -> Tensor:
    """The share of the coordinates in which points differ from their images, ``[R]``."""
    return (point != x).flatten(1).float().mean(1)


class AutoPgd(RowSearch):
    """One run of Auto-PGD.

    A checkpoint halves an image's step size if at most a share ``rho`` of the steps since the last checkpoint raised
    the loss, or if the last checkpoint did not halve it and the highest loss has not risen since.
    """

    def __init__(self, *given: Any, rho: float = 0.0, claims: bool = True, **options: Any):
        super().__init__(*given, **options)
        begin, self.rho, self.claims = self.point, rho, claims
        self.gradients = Gradients(self.objective, begin, self.rows.labels)
        nothing = torch.full((len(begin),), -torch.inf, device=begin.device)
        self.previous = self.best = self.gradient = self.top = begin
        self.score = torch.stack([nothing, nothing])
        self.marks = checkpoints(self.steps)
        self.sighted, self.blind_steps = False, 0
        self.step, self.halved = 2 * self.rows.ball.eps, torch.ones_like(nothing, dtype=torch.bool)
        self.top_gradient, self.top_loss = torch.zeros_like(begin), nothing
        self.last_loss, self.checked_loss, self.rises = -nothing, nothing, torch.zeros_like(nothing)

    def run(self) -> None:
        """Take all steps, or stop when no row is left."""
        for i in range(self.steps):
            self._look()
            if self.claims and self.active.leave and self.shrinks_after(i + 1):
                if not self.sighted and self._is_blind():
                    break
                self._shrink(i + 1)
                if len(self.point) == 0:
                    return
            origin, gradient = self.point, self.gradient
            if i in self.marks:
                wide = per_image(self._check(i), self.point)
                origin = torch.where(wide, self.top, self.point)
                gradient = torch.where(wide, self.top_gradient, self.gradient)
            self.point, self.previous = self._move(i, origin, gradient), origin
        self._see_move(slice(None))
        if self.claims:
            self.active.tried.index_fill_(0, self.rows.owner, True)
            self._finish(slice(None))

    def keep(self) -> Tensor:
        """Remember the best points so far without a judgement, and return the best point of each image."""
        return self.active.keep_best(self.rows.owner, self.best, self.score)

    def _is_blind(self) -> bool:
        """Return True if the run ends, because no element of a gradient so far could move a point.

        A model without randomness has the same gradients again. On a random model the gradients of some draws may be
        zero by chance, so `BLIND_DRAWS` draws decide.
        """
        usable = (self.gradient.isfinite() & (self.gradient != 0)).flatten(1).any(1)
        # At a misclassified point a gradient of 0 is no fault.
        self.sighted = bool((usable | (self.score[0] == 1)).any())
        self.blind_steps += 1
        few = self.active.draws_differ and self.blind_steps * self.objective.eot_iter < BLIND_DRAWS
        if self.sighted or few:
            return False
        self.active.ended_blind = True
        return True

    def take(self, index: Tensor) -> None:
        super().take(index)
        if len(index):
            # Otherwise the new object would first copy the old one's state out of the buffers of their CUDA graph.
            del self.gradients
            self.gradients = Gradients(self.objective, self.point, self.rows.labels)

    def _look(self) -> None:
        """Take the gradient at the present points, and remember the points that are the best so far."""
        now = self.gradients.at(self.point)
        self.gradient, loss = now.image.to(self.point.dtype), now.loss
        if self.health is not None:
            self.health.see_gradient(self.gradient, zero_is_no_fault(self.objective, now))
        self.best, self.score = better_of(self.best, self.score, self.point, now.score)
        higher = loss > self.top_loss
        wide = per_image(higher, self.point)
        self.top = torch.where(wide, self.point, self.top)
        self.top_gradient = torch.where(wide, self.gradient, self.top_gradient)
        self.top_loss = torch.where(higher, loss, self.top_loss)
        self.rises = self.rises + (loss > self.last_loss)
        self.last_loss = loss

    def _check(self, i: int) -> Tensor:
        """Adapt the step sizes at a checkpoint, and tell which rows continue at ``top``, bool ``[R]``."""
        few = self.rises <= self.rho * self.marks[i]
        stuck = ~self.halved & (self.top_loss <= self.checked_loss)
        self.halved = few | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.last_loss = torch.where(self.halved, self.top_loss, self.last_loss)
        self.checked_loss, self.rises = self.top_loss, torch.zeros_like(self.rises)
        return self.halved

    def _move(self, i: int, point: Tensor, gradient: Tensor) -> Tensor:
        """Take step ``i`` from points along gradients, both ``[R, ...]``."""
        ball, momentum = self.rows.ball, MOMENTUM if i > 0 else 1.0
        step = {"eps": ball.eps, "momentum": momentum, **ball.bounds}
        return apgd_step(point, gradient, self.rows.x, self.previous, self.step, **step)

    def _shrink(self, step: int) -> None:
        """Remove the rows of fallen images, and the rows that are given up."""
        share, fell = self.active.confirm_successes(self.rows.owner, self.best, self.score[0])
        self.score = torch.stack([share, self.score[1]])
        # The border is the smallest loss that a misclassified image can have. For the cross-entropy it is log 2,
        # because the true class of such an image has at most half of the probability. For all other losses it is 0.
        border = math.log(2) if self.objective.loss == "ce" else 0.0
        lost = self.out_of_reach(step, border - self.top_loss)
        if lost is None and not fell:
            return
        kept = self.active.rows_to_keep(self.rows.owner, lost)
        moved = (self.best != self.rows.begin).flatten(1).any(1)
        if lost is not None:
            index = lost.nonzero()[:, 0]
            self._finish(index)
            self._see_move(index)
            moved &= ~lost
        if kept is not None:
            if self.health is not None:
                # A row that fell at its first point says nothing about the gradients, because it took no step.
                self.health.add(images=moved.sum() - moved[kept].sum())
            self.take(kept)

    def may_end(self) -> Tensor:
        # A row without a gradient, or with an unchanged point, is a sign of masked gradients, so it is not given up.
        return self.gradient.flatten(1).any(1) & (self.point != self.rows.begin).flatten(1).any(1)

    def _see_move(self, index: Tensor | slice) -> None:
        if self.health is not None:
            correct = self.active.correct[self.rows.owner[index]]
            self.health.see_move(self.rows.begin[index], self.point[index], correct)

    def _finish(self, index: Tensor | slice) -> None:
        """Compare the best point of some rows with the last point, and pass the better one to `keep_best`."""
        owner, labels = self.rows.owner[index], self.rows.labels[index]
        best, last, score = self.best[index], self.point[index], self.score[:, index]
        if self.objective.eot_iter > 1:
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            score = self.objective.score(best, labels)
        best, score = better_of(best, score, last, self.objective.score(last, labels))
        if self.active.leave:
            # If the search used a copy, every point is judged, because the model may misclassify a point that the copy
            # classifies correctly.
            by_copy = self.objective.model is not self.active.judge.model
            claimed = torch.ones_like(score[0]) if by_copy else score[0]
            share, _ = self.active.confirm_successes(owner, best, claimed)
            score = torch.stack([share, score[1]])
        self.active.keep_best(owner, best, score)


class AutoPgdL1(AutoPgd):
    """One run of Auto-PGD in the l1 ball. The first steps move a share of the coordinates: ``share``, or a fifth."""

    def __init__(self, *given: Any, share: Tensor | None = None, **options: Any):
        super().__init__(*given, **options)
        self.marks, self.step = checkpoints_l1(self.steps), self.rows.ball.eps.clone()
        # `run_from_larger` has divided the share of changed coordinates by SPARSER, so it is multiplied here.
        self.changed = torch.ones_like(self.top_loss) if share is None else share * SPARSER
        self.share = torch.full_like(self.top_loss, FIRST_SHARE) if share is None else share

    def _check(self, i: int) -> Tensor:
        eps, changed = self.rows.ball.eps, changed_share(self.top, self.rows.x)
        sparser = changed < FEWER * self.changed
        self.step = torch.where(sparser, eps, (self.step / SHRINK).maximum(eps / SHORTEST))
        self.share, self.changed = changed / SPARSER, changed
        return sparser

    def _move(self, i: int, point: Tensor, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        size = torch.where(flat.isfinite().all(1, keepdim=True), flat.abs(), 0.0)
        place = ((1 - self.share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
        least = size.sort(1).values.gather(1, place[:, None])
        sign = torch.where((size >= least) & (size > 0), flat.sign(), 0.0)
        unit = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        moved = point + per_image(self.step.to(point.dtype), point) * unit.view_as(point)
        return projected(self.rows.x, moved, self.rows.ball)


def run_from_larger(objective: Objective, active: ActiveSet, rows: Rows, steps: int) -> None:
    """Make one run in the l1 ball: in three times its radius, then twice its radius, then its radius."""
    parts = [math.ceil(part * steps) for part in LARGER_STEPS[:-1]]
    # The last ball gets at least one step.
    parts.append(max(1, steps - sum(parts)))
    begin = rows.begin
    for factor, count in zip(LARGER, parts, strict=True):
        ball = replace(rows.ball, eps=factor * rows.ball.eps)
        begin = projected(rows.x, begin, ball)
        share = changed_share(begin, rows.x) / SPARSER
        part = rows._replace(ball=ball, begin=begin)
        search = AutoPgdL1(objective, active, part, count, claims=factor == 1, share=share)
        # Points in a larger ball do not count.
        with keeping(search.keep) if factor == 1 else contextlib.nullcontext():
            search.run()
        begin = search.top
