"""What attacks do besides their steps: keep the best point, watch the gradients, start again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._tensors import per_image
from ..protocols import Classifier
from ..speed.step_loops import State
from .draws import Gradient, Objective, drawn_once_per_call
from .frozen_model import frozen
from .health import GradientHealth, faults


def better_of(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Of two points per image, the one misclassified in more of the draws, then the one of higher loss.

    Args:
        best: points ``[B, ...]``, kept where the others are only as good.
        best_score: their `Gradient.score`, ``[2, B]``.
        x: other points, ``[B, ...]``.
        score: theirs, ``[2, B]``.

    Returns:
        The better points and their scores.
    """
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(per_image(higher, x), x, best), torch.where(higher, score, best_score)


def forgiven(objective: Objective, found: Gradient) -> Tensor | None:
    """Which images may have a zero gradient, bool ``[B]``; None for none of them.

    Args:
        objective: what the attack raises.
        found: gradient and score of the images.
    """
    # once an image is fooled, dlr is flat: 1, where the true class is third
    return None if objective.loss == "ce" else found.wrong == 1


def noted(objective: Objective, memory: State, point: Tensor, found: Gradient) -> State:
    """What a search remembers after one more point, `Search.memory`; waits for nothing.

    Args:
        objective: what the attack raises.
        memory: what it remembered before; other tensors among it are not looked at.
        point: images ``[B, ...]``.
        found: their score and gradient.

    Returns:
        The new values of what is remembered.
    """
    new: State = {}
    if "nonfinite" in memory:
        nonfinite, zero = faults(found.image, forgiven(objective, found))
        new = {"nonfinite": memory["nonfinite"] + nonfinite, "zero": memory["zero"] + zero}
    if "best" in memory:
        new["best"], new["best_score"] = better_of(memory["best"], memory["best_score"], point, found.score)
    return new


def remembers(memory: State) -> bool:
    """Whether a search remembers anything of the points it meets, so that `noted` needs their scores.

    Args:
        memory: `Search.memory`, and other tensors, which are not looked at.
    """
    return "nonfinite" in memory or "best" in memory


class Search:
    """The points that one run of an attack meets: the best of them, and the health of their gradients.

    Nothing here waits for the device.

    Args:
        objective: what the attack raises.
        begin: where it begins, ``[B, ...]``.
        y: labels, as of `Objective.gradient`.
        keep_best: whether the best point is returned, and not the last.
        health: counts gradients and movement, if given.

    Attributes:
        best: the best point so far, ``[B, ...]``; there is none unless it is kept.
        best_score: its score, ``[2, B]``.
    """

    def __init__(
        self,
        objective: Objective,
        begin: Tensor,
        y: Tensor,
        *,
        keep_best: bool = True,
        health: GradientHealth | None = None,
    ):
        self.objective, self.begin, self.y = objective, begin, y
        self.keep_best, self.health = keep_best, health
        if keep_best:
            self.best, self.best_score = begin, torch.full((2, len(begin)), -torch.inf, device=begin.device)

    def see(self, point: Tensor, found: Gradient) -> None:
        """Take note of a point.

        Args:
            point: images ``[B, ...]``.
            found: their score, and the gradient whose health counts.
        """
        if self.health is not None:
            self.health.see_gradient(found.image, forgiven(self.objective, found))
        if self.keep_best:
            self.best, self.best_score = better_of(self.best, self.best_score, point, found.score)

    def memory(self) -> State:
        """What the search remembers, as tensors for a step that goes on with `noted`; empty if that is nothing."""
        memory: State = {}
        if self.health is not None:
            memory |= {name: self.begin.new_zeros((), dtype=torch.int64) for name in ("nonfinite", "zero")}
        if self.keep_best:
            # the score of a model in float64 is float64, that of one in half precision float32
            wide = torch.promote_types(self.begin.dtype, torch.float32)
            memory |= {"best": self.best, "best_score": self.best_score.to(wide)}
        return memory

    def recall(self, memory: State, steps: int) -> None:
        """Go on with what a loop of steps has noted.

        Args:
            memory: `memory` as the loop left it.
            steps: how many points it noted.
        """
        if self.health is not None:
            self.health.add(steps * len(self.begin), memory["nonfinite"], memory["zero"])
        if self.keep_best:
            self.best, self.best_score = memory["best"], memory["best_score"]

    def see_move(self, x: Tensor, last: Tensor) -> None:
        """Count the images, of those classified correctly, that the attack left where it began.

        Args:
            x: the clean images ``[B, ...]``.
            last: the last point ``[B, ...]``.
        """
        if self.health is not None:
            with torch.no_grad():
                correct = self.objective.model(x).argmax(1) == self.y
            self.health.see_move(self.begin, last, correct)

    def judge_afresh(self) -> None:
        """Score the best point by fresh draws: the highest of many noisy scores is high by luck."""
        if self.objective.eot_iter > 1:
            self.best_score = self.objective.score(self.best, self.y)

    def result(self, last: Tensor) -> Tensor:
        """What the attack returns: the last point, or the best one, the last included, judged afresh.

        Args:
            last: the last point ``[B, ...]``, not seen yet.
        """
        if not self.keep_best:
            return last
        last_score = self.objective.score(last, self.y)
        self.judge_afresh()
        self.best, self.best_score = better_of(self.best, self.best_score, last, last_score)
        return self.best


def worst_of_restarts(
    attack: Callable[[int], Tensor], model: Classifier, y: Tensor, *, restarts: int, eot_iter: int
) -> Tensor:
    """The run of an attack after which an image is misclassified in most draws, and of these the one of largest margin.

    A prediction that names no class is misclassified, and its margin is larger than any other: a further run never
    takes a success away.

    Args:
        attack: a run, of its number from 0, to adversarial images ``[B, ...]``.
        model: images to logits, which judges the runs.
        y: labels, int64 ``[B]``.
        restarts: how many runs; the only run is not judged.
        eot_iter: draws of a random model that judge a run.
    """
    best = attack(0)
    if restarts == 1:
        return best
    most = max(1, len(y))

    def score(found: Tensor) -> Tensor:
        wrong, margins = judge.score(found, y)
        return torch.stack([wrong, margins.masked_fill(margins.isnan(), torch.inf)])

    with frozen(model), torch.no_grad():
        apart = drawn_once_per_call(model, best, eot_iter, most)
        # one draw of every image in a pass
        judge = Objective(model, "margin", eot_iter, most, apart=apart)
        best_score = score(best)
        for restart in range(1, restarts):
            found = attack(restart)
            best, best_score = better_of(best, best_score, found, score(found))
    return best
