"""Helpers that attacks share: they count faulty gradients, and remember the best point of each image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._tensors import per_image
from ..speed.graphs.step_loop import State
from .attacked_model import logits_of
from .objective import Gradient, Objective

#: The largest allowed shares of non-finite gradients, of zero gradients, and of unmoved images. If an attack exceeds
#: such a limit, it had no usable gradients, and its result says nothing about the defence.
MAX_NONFINITE, MAX_ZERO, MAX_UNMOVED = 0.0, 0.05, 0.01


#: The names of the counts of `faults`.
FAULTS = ("nonfinite", "zero", "exempt")


def faults(grad: Tensor, fooled: Tensor | None = None) -> Tensor:
    """Tell which gradients are non-finite, which are zero, and which are zero but ``fooled``, bool ``[3, B]``."""
    # The largest element of a row is NaN if any element is.
    peak = torch.linalg.vector_norm(grad.detach().flatten(1), ord=torch.inf, dim=1)
    zero = peak == 0
    exempt = torch.zeros_like(zero) if fooled is None else zero & fooled
    return torch.stack([~(peak < torch.inf), zero & ~exempt, exempt])


@dataclass
class GradientHealth:
    """The counts that show whether an attack had usable gradients.

    A gradient is non-finite if any of its elements is, and zero if all are zero. For some losses, zeros at
    misclassified images are not counted at all. An image is unmoved if the clean image is classified correctly and the
    run ends at its first point. The counts remain on the device until a property is read.

    Args:
        counts: a dict from the names that `count` accepts to numbers or tensors of shape []; empty at first.
    """

    counts: dict[str, Tensor | int] = field(default_factory=dict)

    def add(self, **amounts: Tensor | int) -> None:
        """Add numbers to the counts, by the names of `count`. ``gradients`` is the number of images times steps."""
        for name, amount in amounts.items():
            self.counts[name] = self.counts.get(name, 0) + amount

    def see_gradient(self, grad: Tensor, fooled: Tensor | None = None) -> None:
        """Count the gradients [B, ...] of one step; zeros at the images ``fooled`` are left out."""
        nonfinite, zero, exempt = faults(grad, fooled).sum(1)
        self.add(gradients=len(grad) - exempt, nonfinite=nonfinite, zero=zero)

    def see_move(self, start: Tensor, end: Tensor, correct: Tensor) -> None:
        """Count the images where ``correct``, bool [B], is True, and those of them whose point did not move."""
        still = (start == end).flatten(1).all(1)
        self.add(images=correct.sum(), unmoved=(still & correct).sum())

    def count(self, name: str) -> int:
        """The count called ``gradients``, ``nonfinite``, ``zero``, ``images`` or ``unmoved``."""
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
        """Share of the correctly classified images whose last point in a run equals the first point."""
        return self.count("unmoved") / max(1, self.count("images"))

    @property
    def reliable(self) -> bool:
        """True if no share is above its limit, so that the attack's result says something about the defence."""
        return self.nonfinite <= MAX_NONFINITE and self.zero <= MAX_ZERO and self.unmoved <= MAX_UNMOVED


def better_of(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two points per image, by wrong draws and then by loss, and its score ``[2, B]``."""
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(per_image(higher, x), x, best), torch.where(higher, score, best_score)


def zero_is_no_fault(objective: Objective, gradient: Gradient) -> Tensor | None:
    """Tell for which images a zero gradient is no fault, bool ``[B]``; None: for no image."""
    # At a misclassified image the gradient of dlr can be 0: the loss is constantly 1 if the true class has the third
    # highest logit.
    return None if objective.loss == "ce" else gradient.wrong == 1


def record_point(objective: Objective, memory: State, point: Tensor, gradient: Gradient) -> State:
    """The new values of `Search.memory` after one more point, computed without waiting for the device."""
    new: State = {}
    if "nonfinite" in memory:
        counts = faults(gradient.image, zero_is_no_fault(objective, gradient)).sum(1)
        new = {name: memory[name] + count for name, count in zip(FAULTS, counts, strict=True)}
    if "best" in memory:
        new["best"], new["best_score"] = better_of(memory["best"], memory["best_score"], point, gradient.score)
    return new


class Search:
    """The best point of one run of an attack, and the counts of faulty gradients. No method waits for the device."""

    def __init__(self, objective: Objective, begin: Tensor, y: Tensor, keep_best: bool, health: GradientHealth | None):
        self.objective, self.begin, self.y, self.health = objective, begin, y, health
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
        self.recall(self.memory | record_point(self.objective, self.memory, point, gradient), 1)

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
        if "best" not in self.memory:
            return last
        best, best_score = self.memory["best"], self.memory["best_score"]
        last_score = self.objective.score(last, self.y)
        if self.objective.eot_iter > 1:
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            best_score = self.objective.score(best, self.y)
        return better_of(best, best_score, last, last_score)[0]
