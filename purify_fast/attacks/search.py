"""What attacks do besides their steps: watch the gradients, keep the best point, start again."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._tensors import per_image
from ..speed.graphs.step_graphs import State
from .objective import Gradient, Objective

#: Above these an attack's number measures the gradients, not the defence.
MAX_NONFINITE, MAX_ZERO, MAX_UNMOVED = 0.0, 0.05, 0.01


def faults(grad: Tensor, fooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which of a batch's gradients have a non-finite element, and which are zero, bool ``[B]``; waits for nothing.

    Where an image is fooled, bool ``[B]``, the attack needs no gradient, so that zero is no fault.
    """
    # the largest of a row is NaN if any of it is
    peak = torch.linalg.vector_norm(grad.detach().flatten(1), ord=torch.inf, dim=1)
    zero = peak == 0
    return ~(peak < torch.inf), zero if fooled is None else zero & ~fooled


@dataclass
class GradientHealth:
    """Gradient health: whether an attack had gradients to work with, or was stopped by their absence.

    It counts over all gradients an attack took; pass one to an attack and read it afterwards. A gradient is non-finite
    when any element is, zero when all are and the image is not yet fooled. ``unmoved`` counts the images, of those
    classified correctly at the start, that the attack left where it started. Accumulated on the device, read without
    syncing until a property is asked for.
    """

    _counts: dict[str, Tensor | int] = field(default_factory=dict)

    def add(self, **amounts: Tensor | int) -> None:
        """Count what was looked at elsewhere: ``gradients``, one for each image and step, and so on, as in `count`."""
        for name, amount in amounts.items():
            self._counts[name] = self._counts.get(name, 0) + amount

    def see_gradient(self, grad: Tensor, fooled: Tensor | None = None) -> None:
        """Count one gradient [B, ...]; ``fooled`` [B], bool: where the attack needs none, so that zero is no fault."""
        nonfinite, zero = faults(grad, fooled)
        self.add(gradients=len(grad), nonfinite=nonfinite.sum(), zero=zero.sum())

    def see_move(self, start: Tensor, end: Tensor, correct: Tensor) -> None:
        """Count the images of ``correct`` [B] that ended where they started, both [B, ...]."""
        still = (start == end).flatten(1).all(1)
        self.add(images=correct.sum(), unmoved=(still & correct).sum())

    def count(self, name: str) -> int:
        """``gradients``, ``nonfinite``, ``zero``, ``images`` or ``unmoved``."""
        return int(self._counts.get(name, 0))

    @property
    def nonfinite(self) -> float:
        """Share of gradients with a non-finite element."""
        return self.count("nonfinite") / max(1, self.count("gradients"))

    @property
    def zero(self) -> float:
        """Share of gradients that are zero everywhere."""
        return self.count("zero") / max(1, self.count("gradients"))

    @property
    def unmoved(self) -> float:
        """Share of correctly classified images left where they started."""
        return self.count("unmoved") / max(1, self.count("images"))

    @property
    def reliable(self) -> bool:
        """Whether the attack's number may be believed."""
        return self.nonfinite <= MAX_NONFINITE and self.zero <= MAX_ZERO and self.unmoved <= MAX_UNMOVED


def better_of(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Of two points per image, the one misclassified in more of the draws, then the one of higher loss.

    The points are ``[B, ...]``, their scores `Gradient.score`, ``[2, B]``; ``best`` stays where the others are only as
    good.
    """
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(per_image(higher, x), x, best), torch.where(higher, score, best_score)


def forgiven(objective: Objective, gradient: Gradient) -> Tensor | None:
    """Which images may have a zero gradient, bool ``[B]``; None for none of them."""
    # once an image is fooled, dlr is flat: 1, where the true class is third
    return None if objective.loss == "ce" else gradient.wrong == 1


def remembers(memory: State) -> bool:
    """Whether a search remembers anything of the points it meets, so that `noted` needs their scores."""
    return "nonfinite" in memory or "best" in memory


def noted(objective: Objective, memory: State, point: Tensor, gradient: Gradient) -> State:
    """The new values of what a search remembers, `Search.memory`, after one more point; waits for nothing.

    Other tensors among the memory are not looked at.
    """
    new: State = {}
    if "nonfinite" in memory:
        nonfinite, zero = faults(gradient.image, forgiven(objective, gradient))
        new = {"nonfinite": memory["nonfinite"] + nonfinite.sum(), "zero": memory["zero"] + zero.sum()}
    if "best" in memory:
        new["best"], new["best_score"] = better_of(memory["best"], memory["best_score"], point, gradient.score)
    return new


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
        """What the attack on clean images x returns: the last point, which was not seen yet, or the best one.

        The best one is the last if that is better, by fresh draws of both.
        """
        if self.health is not None:
            nonfinite, zero = self.memory["nonfinite"], self.memory["zero"]
            self.health.add(gradients=self.points * len(self.begin), nonfinite=nonfinite, zero=zero)
            with torch.no_grad():
                parts = x.split(self.objective.max_forward_batch or max(1, len(x)))
                correct = torch.cat([self.objective.model(part) for part in parts]).argmax(1) == self.y
            self.health.see_move(self.begin, last, correct)
        if "best" not in self.memory:
            return last
        best, best_score = self.memory["best"], self.memory["best_score"]
        last_score = self.objective.score(last, self.y)
        if self.objective.eot_iter > 1:
            # the highest of many noisy scores is high by luck
            best_score = self.objective.score(best, self.y)
        return better_of(best, best_score, last, last_score)[0]
