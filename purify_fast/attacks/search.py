"""Helpers that attacks share: they remember the best point of each image, and record faulty gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._tensors import per_image
from ..speed.graphs.step_loop import State
from .attacked_model import logits_of
from .health import FAULTS, faults
from .objective import Gradient, Objective

if TYPE_CHECKING:
    from .health import GradientHealth


def better_of(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two points per image, by wrong draws and then by loss, and its score ``[2, B]``."""
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(per_image(higher, x), x, best), torch.where(higher, score, best_score)


def count_faults(objective: Objective, memory: State, gradient: Gradient) -> State:
    """The counts of faulty gradients in `Search.memory` after one more point, without waiting for the device."""
    # At a misclassified image the gradient of dlr can be 0: the loss is constantly 1 if the true class has the third
    # highest logit. So a zero is no fault there.
    counts = faults(gradient.image, None if objective.loss == "ce" else gradient.wrong == 1).sum(1)
    return {name: memory[name] + count for name, count in zip(FAULTS, counts, strict=True)}


def keep_better(memory: State, point: Tensor, gradient: Gradient) -> State:
    """The best points in `Search.memory`, and their scores, after one more point."""
    best, score = better_of(memory["best"], memory["best_score"], point, gradient.score)
    return {"best": best, "best_score": score}


class Search:
    """The best point of one run of an attack, and the counts of faulty gradients. No method waits for the device."""

    def __init__(self, objective: Objective, begin: Tensor, y: Tensor, keep_best: bool, health: GradientHealth | None):
        self.objective, self.begin, self.y, self.health, self.keep_best = objective, begin, y, health, keep_best
        self.points = 0
        self.memory: State = {}
        if health is not None:
            self.memory |= {name: begin.new_zeros((), dtype=torch.int64) for name in FAULTS}
        if keep_best:
            # The scores of a model in float64 are float64. The scores of a model in half precision are float32.
            wide = torch.promote_types(begin.dtype, torch.float32)
            score = torch.full((2, len(begin)), -torch.inf, dtype=wide, device=begin.device)
            self.memory |= {"best": begin, "best_score": score}

    def see(self, point: Tensor, gradient: Gradient) -> None:
        """Remember the points ``[B, ...]`` that are the best so far, and count the faulty gradients at all points."""
        new: State = {}
        if self.health is not None:
            new |= count_faults(self.objective, self.memory, gradient)
        if self.keep_best:
            new |= keep_better(self.memory, point, gradient)
        self.recall(self.memory | new, 1)

    def recall(self, memory: State, points: int) -> None:
        """Store the memory after ``points`` further steps, which another object has taken."""
        self.memory, self.points = {name: memory[name] for name in self.memory}, self.points + points

    def result(self, x: Tensor, last: Tensor) -> Tensor:
        """The images that an attack returns: last points, or with ``keep_best`` the better of last and best."""
        if self.health is not None:
            nonfinite, zero, exempt = (self.memory[name] for name in FAULTS)
            self.health.add(gradients=self.points * len(self.begin) - exempt, nonfinite=nonfinite, zero=zero)
            with torch.no_grad():
                parts = x.split(self.objective.max_forward_batch or max(1, len(x)))
                correct = torch.cat([logits_of(self.objective.model, part) for part in parts]).argmax(1) == self.y
            self.health.see_move(self.begin, last, correct)
        if not self.keep_best:
            return last
        best, best_score = self.memory["best"], self.memory["best_score"]
        last_score = self.objective.score(last, self.y)
        if self.objective.eot_iter > 1:
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            best_score = self.objective.score(best, self.y)
        return better_of(best, best_score, last, last_score)[0]
