"""What attacks do besides their steps: keep the best point, watch the gradients, start again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._tensors import per_image
from ..protocols import Classifier
from ..speed.graphs.loops import State
from .answers import drawn_once_per_call
from .frozen_model import frozen
from .health import GradientHealth, faults
from .objective import Gradient, Objective


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


def forgiven(objective: Objective, gradient: Gradient) -> Tensor | None:
    """Which images may have a zero gradient, bool ``[B]``; None for none of them."""
    # once an image is fooled, dlr is flat: 1, where the true class is third
    return None if objective.loss == "ce" else gradient.wrong == 1


def noted(objective: Objective, memory: State, point: Tensor, gradient: Gradient) -> State:
    """The new values of what a search remembers, `Search.memory`, after one more point; waits for nothing.

    Args:
        objective: what the attack raises.
        memory: what it remembered before; other tensors among it are not looked at.
        point: images ``[B, ...]``.
        gradient: their score and gradient.
    """
    new: State = {}
    if "nonfinite" in memory:
        nonfinite, zero = faults(gradient.image, forgiven(objective, gradient))
        new = {"nonfinite": memory["nonfinite"] + nonfinite, "zero": memory["zero"] + zero}
    if "best" in memory:
        new["best"], new["best_score"] = better_of(memory["best"], memory["best_score"], point, gradient.score)
    return new


def remembers(memory: State) -> bool:
    """Whether a search remembers anything of the points it meets, so that `noted` needs their scores."""
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
        memory: what is remembered, as tensors for a step that goes on with `noted`; empty if that is nothing.
    """

    def __init__(
        self, objective: Objective, begin: Tensor, y: Tensor, *, keep_best: bool, health: GradientHealth | None
    ):
        self.objective, self.begin, self.y, self.health = objective, begin, y, health
        self.points = 0
        self.memory: State = {}
        if health is not None:
            self.memory |= {name: begin.new_zeros((), dtype=torch.int64) for name in ("nonfinite", "zero")}
        if keep_best:
            # the score of a model in float64 is float64, that of one in half precision float32
            wide = torch.promote_types(begin.dtype, torch.float32)
            score = torch.full((2, len(begin)), -torch.inf, dtype=wide, device=begin.device)
            self.memory |= {"best": begin, "best_score": score}

    def see(self, point: Tensor, gradient: Gradient) -> None:
        """Take note of a point, images ``[B, ...]``, and of the gradient whose health counts."""
        self.recall(self.memory | noted(self.objective, self.memory, point, gradient), 1)

    def recall(self, memory: State, points: int) -> None:
        """Go on with what a loop of steps has noted of so many points."""
        self.memory, self.points = {name: memory[name] for name in self.memory}, self.points + points

    def result(self, x: Tensor, last: Tensor) -> Tensor:
        """What the attack on clean images returns: the last point, or the best one, the last included, judged afresh.

        Args:
            x: the clean images ``[B, ...]``.
            last: the last point ``[B, ...]``, not seen yet.
        """
        if self.health is not None:
            self.health.add(self.points * len(self.begin), self.memory["nonfinite"], self.memory["zero"])
            with torch.no_grad():
                correct = self.objective.model(x).argmax(1) == self.y
            self.health.see_move(self.begin, last, correct)
        if "best" not in self.memory:
            return last
        best, best_score = self.memory["best"], self.memory["best_score"]
        last_score = self.objective.score(last, self.y)
        if self.objective.eot_iter > 1:
            # the highest of many noisy scores is high by luck
            best_score = self.objective.score(best, self.y)
        return better_of(best, best_score, last, last_score)[0]


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

    def score(points: Tensor) -> Tensor:
        wrong, margins = judge.score(points, y)
        return torch.stack([wrong, margins.masked_fill(margins.isnan(), torch.inf)])

    with frozen(model), torch.no_grad():
        apart = drawn_once_per_call(model, best, eot_iter, most)
        # one draw of every image in a pass
        judge = Objective(model, "margin", eot_iter, most, apart=apart)
        best_score = score(best)
        for restart in range(1, restarts):
            points = attack(restart)
            best, best_score = better_of(best, best_score, points, score(points))
    return best
