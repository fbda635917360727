"""The work of attacks besides their steps: they watch the gradients and keep the best point."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._tensors import per_image
from ..speed.graphs.step_graphs import State
from .objective import Gradient, Objective

#: If the share of gradients that are not finite, of gradients that are zero, or of images that did not move is above
#: these limits, an attack failed for lack of gradients and says nothing about the defence.
MAX_NONFINITE, MAX_ZERO, MAX_UNMOVED = 0.0, 0.05, 0.01


def faults(grad: Tensor, fooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tell which gradients have a non-finite element, and which are zero, bool ``[B]``, without waiting for the device.

    An image that is fooled, bool ``[B]``, needs no gradient, so zero is not a fault there.
    """
    # The largest element of a row is NaN if any element is.
    peak = torch.linalg.vector_norm(grad.detach().flatten(1), ord=torch.inf, dim=1)
    zero = peak == 0
    return ~(peak < torch.inf), zero if fooled is None else zero & ~fooled


@dataclass
class GradientHealth:
    """Gradient health: whether an attack had gradients to work with, or was stopped by their absence.

    It counts over all gradients of an attack. A gradient is non-finite if any element is. It is zero if all elements
    are and the image is not fooled yet. ``unmoved`` counts the images that were classified correctly at the start and
    that the attack left there. The counts stay on the device until a property is read.

    Args:
        counts: the counts by the names that `count` takes, numbers or tensors []; empty at first.
    """

    counts: dict[str, Tensor | int] = field(default_factory=dict)

    def add(self, **amounts: Tensor | int) -> None:
        """Add to the counts, by the names that `count` takes; ``gradients`` has an entry for each image and step."""
        for name, amount in amounts.items():
            self.counts[name] = self.counts.get(name, 0) + amount

    def see_gradient(self, grad: Tensor, fooled: Tensor | None = None) -> None:
        """Count one gradient [B, ...]; zero is not a fault where ``fooled`` [B], bool, is True."""
        nonfinite, zero = faults(grad, fooled)
        self.add(gradients=len(grad), nonfinite=nonfinite.sum(), zero=zero.sum())

    def see_move(self, start: Tensor, end: Tensor, correct: Tensor) -> None:
        """Count the images of ``correct`` [B] that ended where they started, both [B, ...]."""
        still = (start == end).flatten(1).all(1)
        self.add(images=correct.sum(), unmoved=(still & correct).sum())

    def count(self, name: str) -> int:
        """``gradients``, ``nonfinite``, ``zero``, ``images`` or ``unmoved``."""
        return int(self.counts.get(name, 0))

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
        """True if the attack's number may be believed."""
        return self.nonfinite <= MAX_NONFINITE and self.zero <= MAX_ZERO and self.unmoved <= MAX_UNMOVED


def better_of(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two points per image: the point that more draws misclassify, then the point of higher loss.

    The points are ``[B, ...]``, and their scores are `Gradient.score`, ``[2, B]``. ``best`` stays if both are equally
    good.
    """
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(per_image(higher, x), x, best), torch.where(higher, score, best_score)


def forgiven(objective: Objective, gradient: Gradient) -> Tensor | None:
    """Tell which images may have a zero gradient, bool ``[B]``; None: no image may."""
    # At a misclassified image dlr can be flat: it is constantly 1 if the true class is the third.
    return None if objective.loss == "ce" else gradient.wrong == 1


def remembers(memory: State) -> bool:
    """Tell whether a search remembers anything about its points, so that `noted` needs their scores."""
    return "nonfinite" in memory or "best" in memory


def noted(objective: Objective, memory: State, point: Tensor, gradient: Gradient) -> State:
    """The values of `Search.memory` after one more point, computed without waiting for the device.

    Other tensors in the memory are ignored.
    """
    new: State = {}
    if "nonfinite" in memory:
        nonfinite, zero = faults(gradient.image, forgiven(objective, gradient))
        new = {"nonfinite": memory["nonfinite"] + nonfinite.sum(), "zero": memory["zero"] + zero.sum()}
    if "best" in memory:
        new["best"], new["best_score"] = better_of(memory["best"], memory["best_score"], point, gradient.score)
    return new


class Search:
    """The best point of one run of an attack, and the health of its gradients.

    Nothing here waits for the device.

    Args:
        objective: the loss that the attack raises.
        begin: the points at which the run begins, ``[B, ...]``.
        y: labels, as `Objective.gradient` takes them.
        keep_best: whether the run returns its best point instead of its last.
        health: counts gradients and movement, if given.

    Attributes:
        memory: the tensors that a step updates by `noted`; empty if nothing is remembered.
    """

    def __init__(self, objective: Objective, begin: Tensor, y: Tensor, keep_best: bool, health: GradientHealth | None):
        self.objective, self.begin, self.y, self.health = objective, begin, y, health
        self.points = 0
        self.memory: State = {}
        if health is not None:
            self.memory |= {name: begin.new_zeros((), dtype=torch.int64) for name in ("nonfinite", "zero")}
        if keep_best:
            # A model in float64 gives scores in float64. A model in half precision gives scores in float32.
            wide = torch.promote_types(begin.dtype, torch.float32)
            score = torch.full((2, len(begin)), -torch.inf, dtype=wide, device=begin.device)
            self.memory |= {"best": begin, "best_score": score}

    def see(self, point: Tensor, gradient: Gradient) -> None:
        """Remember a point, images ``[B, ...]``, if it is the best, and count the health of its gradient."""
        self.recall(self.memory | noted(self.objective, self.memory, point, gradient), 1)

    def recall(self, memory: State, points: int) -> None:
        """Continue with the memory that a loop of steps has made of so many points."""
        self.memory, self.points = {name: memory[name] for name in self.memory}, self.points + points

    def result(self, x: Tensor, last: Tensor) -> Tensor:
        """The images that the attack on clean images x returns: the last point, which was not seen yet, or the best.

        The last point counts as the best if it is better by fresh draws of both.
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
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            best_score = self.objective.score(best, self.y)
        return better_of(best, best_score, last, last_score)[0]
