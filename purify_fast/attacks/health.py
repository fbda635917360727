"""Gradient health: whether an attack had gradients to work with, or was stopped by their absence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Above these an attack's number measures the gradients, not the defence.
MAX_NONFINITE, MAX_ZERO, MAX_UNMOVED = 0.0, 0.05, 0.01


def faulty_rows(grad: Tensor, fooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which of a batch's gradients are of no use; waits for nothing.

    Args:
        grad: ``[B, ...]``.
        fooled: bool ``[B]``, where the attack needs none, so that zero is no fault.

    Returns:
        Which have a non-finite element, and which are zero, bool ``[B]`` both.
    """
    # the largest of a row is NaN if any of it is
    peak = torch.linalg.vector_norm(grad.detach().flatten(1), ord=torch.inf, dim=1)
    zero = peak == 0
    return ~(peak < torch.inf), zero if fooled is None else zero & ~fooled


def faults(grad: Tensor, fooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many of a batch's gradients are of no use; waits for nothing.

    Args:
        grad: ``[B, ...]``.
        fooled: bool ``[B]``, where the attack needs none, so that zero is no fault.

    Returns:
        How many have a non-finite element, and how many are zero, int64 both.
    """
    nonfinite, zero = faulty_rows(grad, fooled)
    return nonfinite.sum(), zero.sum()


@dataclass
class GradientHealth:
    """Counts over all gradients an attack took; pass one to an attack and read it afterwards.

    A gradient is non-finite when any element is, zero when all are and the image is not yet fooled. ``unmoved`` counts
    the images, of those classified correctly at the start, that the attack left where it started. Accumulated on the
    device, read without syncing until a property is asked for.
    """

    _counts: dict[str, Tensor | int] = field(default_factory=dict)

    def _add(self, name: str, amount: Tensor | int) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount

    def see_gradient(self, grad: Tensor, fooled: Tensor | None = None) -> None:
        """Count one gradient [B, ...]; ``fooled`` [B], bool: where the attack needs none, so that zero is no fault."""
        self.add(len(grad), *faults(grad, fooled))

    def add(self, gradients: int, nonfinite: Tensor, zero: Tensor) -> None:
        """Count gradients that were looked at elsewhere, by `faults`.

        Args:
            gradients: how many, one for each image and step.
            nonfinite: how many of them have a non-finite element, int64.
            zero: how many are zero, int64.
        """
        self._add("gradients", gradients)
        self._add("nonfinite", nonfinite)
        self._add("zero", zero)

    def see_move(self, start: Tensor, end: Tensor, correct: Tensor) -> None:
        """Count the images of ``correct`` [B] that ended where they started, both [B, ...]."""
        still = (start == end).flatten(1).all(1)
        self._add("images", correct.sum())
        self._add("unmoved", (still & correct).sum())

    def see_fallen(self, images: int) -> None:
        """Count images that left the attack because they had fallen: they needed no movement.

        Args:
            images: how many.
        """
        self._add("images", images)

    def count(self, name: str) -> int:
        """``gradients``, ``nonfinite``, ``zero``, ``images`` or ``unmoved``."""
        return int(self._counts.get(name, 0))

    def _share(self, part: str, whole: str) -> float:
        return self.count(part) / max(1, self.count(whole))

    @property
    def nonfinite(self) -> float:
        """Share of gradients with a non-finite element."""
        return self._share("nonfinite", "gradients")

    @property
    def zero(self) -> float:
        """Share of gradients that are zero everywhere."""
        return self._share("zero", "gradients")

    @property
    def unmoved(self) -> float:
        """Share of correctly classified images left where they started."""
        return self._share("unmoved", "images")

    @property
    def reliable(self) -> bool:
        """Whether the attack's number may be believed."""
        return self.nonfinite <= MAX_NONFINITE and self.zero <= MAX_ZERO and self.unmoved <= MAX_UNMOVED


class HealthOfRows:
    """Counts the gradients of a run whose rows may be given up before its end; waits for nothing.

    A row that is given up counts as if it had taken every step, with as large a share of faulty gradients as before.
    Otherwise the rows that are searched to the end, as those without gradients are, would count more than others.

    Args:
        health: where gradients are counted.
        begin: where the rows begin, ``[R, ...]``.
    """

    def __init__(self, health: GradientHealth, begin: Tensor):
        self.health, self._steps = health, 0
        #: How many gradients of each row were not finite, and how many zero.
        self._faults = torch.zeros((2, len(begin)), device=begin.device)

    def see_gradient(self, grad: Tensor, fooled: Tensor | None = None) -> None:
        """Count the gradients of one step.

        Args:
            grad: ``[R, ...]``.
            fooled: bool ``[R]``, where the attack needs none, so that zero is no fault.
        """
        faulty = torch.stack(faulty_rows(grad, fooled))
        self._faults, self._steps = self._faults + faulty, self._steps + 1
        self.health.add(len(grad), *faulty.sum(1))

    def give_up(self, rows: Tensor, steps: int) -> None:
        """Count the gradients that some rows will not take.

        Args:
            rows: which are given up, int64.
            steps: of the whole run.
        """
        left = steps - self._steps
        nonfinite, zero = (self._faults[:, rows].sum(1) * left / self._steps).round().long()
        self.health.add(len(rows) * left, nonfinite, zero)

    def take(self, rows: Tensor) -> None:
        """Go on with some of the rows.

        Args:
            rows: which stay, int64.
        """
        self._faults = self._faults[:, rows]
