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
from ...attacks import objective as objectives
from ...attacks.base import AttackContext, Ball, Resolved, keeping, projected, times
from ...attacks.objective import TARGETED, ApgdLoss, Objective, ObjectiveStep, Search
from ...ops.apgd_step import apgd_step
from ...speed.graphs.step_loop import State
from . import engine
from .engine import USUAL_TARGETS, ActiveSet, EngineAttack, JudgeContext, Rows, RowSearch

#: A run on a random model ends if the gradients of this number of its first draws are all useless.
BLIND_DRAWS = 20
#: The paper's alpha. A move is alpha times the new step plus (1 - alpha) times the last move.
MOMENTUM = 0.75
#: A run in the l1 ball searches three balls in turn. LARGER: their radii, as multiples of the given radius.
#: LARGER_STEPS: the share of the steps in each of them.
LARGER, LARGER_STEPS = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)
#: Constants for the l1 ball (Croce & Hein, "Mind the box", ICML 2021). SPARSER: at a checkpoint, the share of the
#: coordinates in which the point of highest loss differs from the image is divided by SPARSER; the next steps move the
#: resulting share. SHRINK: a checkpoint divides the step size by SHRINK. SHORTEST: the smallest step size is eps
#: divided by SHORTEST.
SPARSER, SHRINK, SHORTEST = 1.5, 1.5, 10.0
#: If the changed coordinates fall below this share of those at the last checkpoint, the step size is eps again.
FEWER = 0.95


@dataclass(frozen=True, kw_only=True)
class APGD(EngineAttack):
    """Auto-PGD; every run begins at another random point.

    Args:
        steps: number of gradient steps of a run. None takes the evaluation's number, or 100 without an evaluation.
        n_target_classes: number of target classes of a targeted loss, each with a run of its own: the classes with the
            nearest decision boundaries, by the model's linear approximation at the image. None takes all wrong classes.
        loss: a name of `purify_fast.attacks.objective.LOSSES`, or of `TARGETED` for a targeted attack. If the model has
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
        return f"APGD-T {steps}{margin}" + engine.targets_and_times(self)

    def resolved_for(self, context: AttackContext) -> Resolved:
        resolved = super().resolved_for(context)
        return resolved if resolved.loss in TARGETED else resolved._replace(n_target_classes=None)

    def may_end_early(self, context: AttackContext) -> bool:
        return super().may_end_early(context) and self.threat_model(context).norm != "l1"

    def explore(self, active: ActiveSet, objective: Objective, context: JudgeContext) -> None:
        steps, loss = self.resolved_for(context).steps, objective.loss
        if loss in objectives.FEWEST_CLASSES:
            objectives.check_classes(loss, active.logits.shape[1])
        # A loss without targets needs no target classes, so the only element of `goals` is None.
        goals = engine.nearest_borders(active, objective, self.n_target_classes) if loss in TARGETED else (None,)
        by_pace = self.give_up and self.leave_when_fallen
        for rows in engine.waves(active, goals, self.restarts, context):
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


@dataclass(frozen=True)
class AutoPgdStep(ObjectiveStep):
    """A step of Auto-PGD that a CUDA graph can capture. It does not use the ball's radius, which is in the state."""

    ball: Ball

    def __call__(self, state: State) -> State:
        """Take the gradient at ``next``, remember the points that are the best so far, and compute the next points."""
        new = self.look(state)
        return new | {"next": self.move(state | new)}

    def look(self, state: State) -> State:
        """Take the gradient at ``next``, which becomes ``point``, and remember the points that are the best so far."""
        point = state["next"]
        now = self.objective.gradient(point, state["y"])
        gradient, loss = now.image.to(point.dtype), now.loss
        higher = loss > state["top_loss"]
        wide = per_image(higher, point)
        return objectives.after_point(self.objective, state, point, now) | {
            "point": point,
            "previous": state["point"],
            "gradient": gradient,
            "top": torch.where(wide, point, state["top"]),
            "top_gradient": torch.where(wide, gradient, state["top_gradient"]),
            "top_loss": torch.where(higher, loss, state["top_loss"]),
            "rises": state["rises"] + (loss > state["last_loss"]),
            "last_loss": loss,
        }

    def move(self, state: State, momentum: float = MOMENTUM) -> Tensor:
        """The points after a step from ``point`` along ``gradient`` and along the last move, from ``previous``."""
        images = state["point"], state["gradient"], state["x"], state["previous"]
        return apgd_step(*images, state["step"], eps=state["eps"], momentum=momentum, **self.ball.bounds)


def from_top(state: State, chosen: Tensor) -> State:
    """The changes of a state by which the ``chosen`` rows, bool ``[R]``, continue at the point of highest loss."""
    names, wide = {"point": "top", "gradient": "top_gradient"}, per_image(chosen, state["point"])
    return {name: torch.where(wide, state[top], state[name]) for name, top in names.items()}


class AutoPgd(RowSearch):
    """One run of Auto-PGD. Its tensors are the state of ``loop``.

    A checkpoint halves an image's step size if at most a share ``rho`` of the steps since the last checkpoint raised
    the loss, or if the last checkpoint did not halve it and the highest loss has not risen since.
    """

    kind: ClassVar[type[AutoPgdStep]] = AutoPgdStep
    marks_of = staticmethod(checkpoints)

    def __init__(self, *arguments: Any, rho: float = 0.0, claims: bool = True, **options: Any):
        super().__init__(*arguments, **options)
        self.rho, self.claims = rho, claims
        self.marks = self.marks_of(self.steps)
        self.sighted, self.blind_steps = False, 0
        self.ascent = self.kind(self.objective, self.rows.ball)
        state = self.begin_state()
        self.checked_loss = state["top_loss"]
        self.halved = torch.ones_like(self.checked_loss, dtype=torch.bool)
        self.begin(self.ascent, state)

    def begin_state(self) -> State:
        """The state before the first step."""
        begin, eps = self.rows.begin, self.rows.ball.eps
        state = Search(self.objective, begin, self.rows.labels, True, self.health).memory
        nothing, zeros = state["best_score"][0], torch.zeros_like(begin)
        state |= {"x": self.rows.x, "y": self.rows.labels, "eps": eps, "step": 2 * eps}
        state |= {"next": begin, "point": begin, "previous": begin, "top": begin, "gradient": zeros}
        state |= {"top_gradient": zeros, "top_loss": nothing, "last_loss": -nothing}
        return state | {"rises": torch.zeros_like(nothing)}

    def ends_after(self, step: int) -> bool:
        if self.claims and self.active.leave and self.shrinks_after(step):
            if not self.sighted and self._is_blind():
                return True
            self._shrink(step)
        if len(self.rows.owner):
            self._turn(step - 1)
        if step == self.steps:
            self.loop.put(point=self.loop.state["next"])
        return False

    def finish(self) -> None:
        self._see_move(slice(None))
        if self.claims:
            self.active.tried.index_fill_(0, self.rows.owner, True)
            self._finish(slice(None))

    def keep(self) -> Tensor:
        """Remember the best points so far without a judgement, and return the best point of each image."""
        return self.active.keep_best(self.rows.owner, self.loop.state["best"], self.loop.state["best_score"])

    def _is_blind(self) -> bool:
        """Return True if the run ends, because no element of a gradient so far could move a point.

        A model without randomness has the same gradients again. On a random model the gradients of some draws may be
        zero by chance, so `BLIND_DRAWS` draws decide.
        """
        gradient = self.loop.state["gradient"]
        usable = (gradient.isfinite() & (gradient != 0)).flatten(1).any(1)
        # At a misclassified point a gradient of 0 is no fault.
        self.sighted = bool((usable | (self.loop.state["best_score"][0] == 1)).any())
        self.blind_steps += 1
        few = self.active.draws_differ and self.blind_steps * self.objective.eot_iter < BLIND_DRAWS
        self.active.ended_blind |= (blind := not (self.sighted or few))
        return blind

    def _turn(self, i: int) -> None:
        """Compute the next points again where step ``i`` moves without momentum, or is a checkpoint."""
        if i == 0 or i in self.marks:
            changes, momentum = (self._check(i), MOMENTUM) if i > 0 else (State(), 1.0)
            self.loop.put(**changes, next=self.ascent.move(self.loop.state | changes, momentum))

    def _check(self, i: int) -> State:
        """Adapt the step sizes at a checkpoint. Return the changes of the state."""
        state = self.loop.state
        few = state["rises"] <= self.rho * self.marks[i]
        stuck = ~self.halved & (state["top_loss"] <= self.checked_loss)
        self.halved = few | stuck
        self.checked_loss = state["top_loss"].clone()
        return from_top(state, self.halved) | {
            "step": torch.where(self.halved, state["step"] / 2, state["step"]),
            "last_loss": torch.where(self.halved, state["top_loss"], state["last_loss"]),
            "rises": torch.zeros_like(state["rises"]),
        }

    def _shrink(self, step: int) -> None:
        """Remove the rows of fallen images, and the rows that are given up."""
        state, owner = self.loop.state, self.rows.owner
        claimed, loss = state["best_score"].unbind()
        share, fell = self.active.confirm_successes(owner, state["best"], claimed)
        if share is not claimed:
            self.loop.put(best_score=torch.stack([share, loss]))
        # The border is the smallest loss that a misclassified image can have. For the cross-entropy it is log 2,
        # because the true class of such an image has at most half of the probability. For all other losses it is 0.
        border = math.log(2) if self.objective.loss == "ce" else 0.0
        lost = self.out_of_reach(step, border - state["top_loss"])
        if lost is None and not fell:
            return
        kept = self.active.rows_to_keep(owner, lost)
        moved = (state["best"] != self.rows.begin).flatten(1).any(1)
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
        gradient, point = self.loop.state["gradient"], self.loop.state["point"]
        return gradient.flatten(1).any(1) & (point != self.rows.begin).flatten(1).any(1)

    def _see_move(self, index: Tensor | slice) -> None:
        if self.health is not None:
            correct = self.active.correct[self.rows.owner[index]]
            self.health.see_move(self.rows.begin[index], self.loop.state["point"][index], correct)

    def _finish(self, index: Tensor | slice) -> None:
        """Compare the best point of some rows with the last point, and pass the better one to `keep_best`."""
        state, owner, labels = self.loop.state, self.rows.owner[index], self.rows.labels[index]
        best, last, score = state["best"][index], state["point"][index], state["best_score"][:, index]
        if self.objective.eot_iter > 1:
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            score = self.objective.score(best, labels)
        best, score = objectives.better_of(best, score, last, self.objective.score(last, labels))
        if self.active.leave:
            # If the search used a copy, every point is judged, because the model may misclassify a point that the copy
            # classifies correctly.
            by_copy = self.objective.model is not self.active.judge.model
            self.active.judge_points(owner, best, score[1], None if by_copy else score[0])
        else:
            self.active.keep_best(owner, best, score)


class AutoPgdL1Step(AutoPgdStep):
    """A step in the l1 ball. It moves the ``share`` of the coordinates that have the largest gradients.

    In a run of fewer than 50 steps, every step is a checkpoint, so the step itself adapts the rows with a ``mark``.
    """

    def __call__(self, state: State) -> State:
        new = self.look(state)
        state, check = state | new, state["mark"]
        eps, changed = state["eps"], changed_share(state["top"], state["x"])
        sparser = check & (changed < FEWER * state["changed"])
        shorter = torch.where(sparser, eps, (state["step"] / SHRINK).maximum(eps / SHORTEST))
        adapted = {
            "step": torch.where(check, shorter, state["step"]),
            "share": torch.where(check, changed / SPARSER, state["share"]),
            "changed": torch.where(check, changed, state["changed"]),
        }
        return new | adapted | {"next": self.move(state | adapted | from_top(state, sparser))}

    def move(self, state: State, momentum: float = MOMENTUM) -> Tensor:
        """The points after a step from ``point`` along ``gradient``, without momentum."""
        point, flat = state["point"], state["gradient"].flatten(1)
        size = torch.where(flat.isfinite().all(1, keepdim=True), flat.abs(), 0.0)
        place = ((1 - state["share"]) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
        least = size.sort(1).values.gather(1, place[:, None])
        sign = torch.where((size >= least) & (size > 0), flat.sign(), 0.0)
        unit = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        moved = point + per_image(state["step"].to(point.dtype), point) * unit.view_as(point)
        return projected(state["x"], moved, replace(self.ball, eps=state["eps"]))


class AutoPgdL1(AutoPgd):
    """One run of Auto-PGD in the l1 ball."""

    kind = AutoPgdL1Step
    marks_of = staticmethod(checkpoints_l1)

    def begin_state(self) -> State:
        state = super().begin_state()
        share = changed_share(state["point"], state["x"]) / SPARSER
        check = torch.zeros_like(share, dtype=torch.bool)
        return state | {"step": state["eps"], "share": share, "changed": share * SPARSER, "mark": check}

    def _turn(self, i: int) -> None:
        """Set the marks if the next step is a checkpoint and this step is none, or the other way round."""
        if ((i + 1) in self.marks) != (i in self.marks):
            self.loop.put(mark=~self.loop.state["mark"])


def run_from_larger(objective: Objective, active: ActiveSet, rows: Rows, steps: int) -> None:
    """Make one run in the l1 ball: in three times its radius, then twice its radius, then its radius."""
    parts = [math.ceil(part * steps) for part in LARGER_STEPS[:-1]]
    # The last ball gets at least one step.
    parts.append(max(1, steps - sum(parts)))
    begin = rows.begin
    for factor, count in zip(LARGER, parts, strict=True):
        ball = replace(rows.ball, eps=factor * rows.ball.eps)
        begin = projected(rows.x, begin, ball)
        part = rows._replace(ball=ball, begin=begin)
        search = AutoPgdL1(objective, active, part, count, claims=factor == 1)
        # Points in a larger ball do not count.
        with keeping(search.keep) if factor == 1 else contextlib.nullcontext():
            search.run()
        begin = search.loop.state["top"]
