"""The base of attacks that search on a copy of the model, and the target classes of such attacks."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...._validation import Count, GradientPrecision
from ....attacks.attacked_model import frozen
from ....attacks.base import AttackResult, InBall, times
from ....attacks.context import AttackContext, keeping
from ....attacks.objective import Objective
from ....attacks.shared_draws import drawn_once_per_call
from ....protocols import Classifier
from ..judge_context import JudgeContext
from .row_batches import FEWEST_STEPS, ActiveSet, Judge

#: The number of wrong classes that AutoAttack's targeted attacks try.
USUAL_TARGETS = 9
#: The distance to the border is computed for this number of wrong classes: those with the highest logits. An attack
#: with more target classes than this computes the distance for as many classes as it has target classes.
CANDIDATES = 20
#: The order of the dual norm for each ball's norm. Within the ball a linear function changes by at most the radius
#: times the dual norm of its gradient.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
#: The warning of a search whose gradients were useless.
BLIND = "runs ended after their first steps, because all of their gradients were zero or not finite"


@dataclass(frozen=True, kw_only=True)
class EngineAttack(InBall):
    """The options of attacks that search on a fast copy of the model, such as `apgd`, `fab_t` and `square`.

    A success on the copy is only a claim. The model itself must confirm it in its own precision, and a random model by
    fresh draws. The image then has fallen, and leaves the batch.

    Args:
        restarts: number of runs for each target; a run attacks only the images that have not fallen yet.
        precision: precision of the search: "float32", "bfloat16" (on a copy of the model) or "auto" (bfloat16 if the
            device is faster in it and the model is large enough). Every success is checked on the model itself.
        give_up: whether the search of an image stops early if it would not reach the decision boundary even at several
            times its recent pace. Attacks with gradients check this after 40, 60 and 80 % of at least 50 steps. After
            15 % of the steps they also stop if the distance to the boundary is much larger than the largest progress of
            earlier searches after their first 15 %. Square checks the pace from query 500 on. Auto-PGD ignores the
            option in the l1 ball and with ``leave_when_fallen=False``. Square ignores it with several draws.
    """

    restarts: Count = 1
    precision: GradientPrecision = "auto"
    give_up: bool = False

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        ball = self.ball(x, y, context)
        if ball.eps.dim() > 1 or isinstance(ball.clip_min, Tensor) or isinstance(ball.clip_max, Tensor):
            raise ValueError(f"eps, clip_min and clip_max must be numbers, or eps [B], for {type(self).__name__}")
        if len(x) == 0:
            return AttackResult(x.clone())
        x = x.detach().clone()
        _, draws, loss, _ = self.resolved_for(context)
        context = JudgeContext.of(context)
        judges, most = context.judges(draws), context.max_forward_batch
        source = context.gradients_from if self.follows_gradients else None
        with frozen(target):
            apart = context.shares_draws or drawn_once_per_call(target, x, max(judges, draws), most)
            judge = Judge(target, judges, most, apart, context.judge_share)
            active = ActiveSet(x, y, ball, judge, context)
            if source is None:
                source = context.source(target, x, self.precision)
            with frozen(source):
                if source is context.gradients_from:
                    apart = context.shares_draws or drawn_once_per_call(source, x, draws, most)
                loss, graphs, toward = context.loss_function or loss, context.graphs, context.toward
                objective = Objective(source, loss, draws, most, graphs=graphs, apart=apart, toward=toward)
                with keeping(lambda: active.best):
                    active.judge_clean_images(leave=getattr(self, "leave_when_fallen", True))
                    self.explore(active, objective, context)
        gave_up = (~active.fallen & ~active.tried).sum()
        return AttackResult(active.best, active.health, [BLIND] * active.ended_blind, gave_up)

    def may_end_early(self, context: AttackContext) -> bool:
        return self.give_up and self.resolved_for(context).steps >= FEWEST_STEPS

    @abc.abstractmethod
    def explore(self, active: ActiveSet, objective: Objective, context: JudgeContext) -> None:
        """Search for an adversarial image of each clean image in ``active``, by the loss ``objective``."""


def targets_and_times(n_target_classes: int | None, restarts: int) -> str:
    """Return the end of an attack's name: the number of targets if it is not the usual number, and the restarts."""
    count = "all" if n_target_classes is None else n_target_classes
    return (f", {count} targets" if count != USUAL_TARGETS else "") + times(restarts)


def likeliest_wrong(logits: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """Return the ``count`` wrong classes of highest logit (None: all), in descending order, each int64 ``[B]``."""
    classes = logits.shape[1]
    wrong = logits.masked_fill(F.one_hot(y, classes).bool(), -torch.inf)
    return wrong.topk(min(count or classes, classes - 1), 1).indices.unbind(1)


def nearest_borders(active: ActiveSet, objective: Objective, count: int | None) -> tuple[Tensor, ...]:
    """Find the classes whose borders are nearest to each image, by the linear approximation at the clean image.

    The distance to a border is the difference of the two logits, divided by the dual norm of its gradient (MALT:
    Melamed, Yehudai & Shamir, NeurIPS 2024, arXiv 2407.02240). It is computed for `CANDIDATES` or ``count`` classes of
    highest logit.
    """
    left, by_margin = active.left(), replace(objective, loss="margin_targeted")
    x, y = active.x[left], active.y[left]
    logits = active.logits[left]
    count = min(count or logits.shape[1], logits.shape[1] - 1)
    candidates = likeliest_wrong(logits, y, max(count, CANDIDATES))
    goals = torch.zeros((len(active.y), count), dtype=torch.int64, device=active.y.device)
    if len(left):
        distances = []
        for candidate in candidates:
            at_image = by_margin.gradient(x, torch.stack([y, candidate], 1))
            slope = torch.linalg.vector_norm(at_image.image.flatten(1), ord=DUAL[active.ball.norm], dim=1)
            # The gradient is a sum over the draws, but the loss is a mean. The loss is negative while the label has the
            # higher logit.
            distances.append(-objective.eot_iter * at_image.loss / slope.clamp_min(torch.finfo(slope.dtype).tiny))
        ranked = torch.stack(distances, 1).nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
        goals[left] = torch.stack(candidates, 1).gather(1, ranked[:, :count])
    return goals.unbind(1)
