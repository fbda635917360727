"""Counts the gradients that an attack could not use, and the images that it did not move."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: The names of the counts of `faults`.
FAULTS = ("nonfinite", "zero", "exempt")


def faults(grad: Tensor, fooled: Tensor | None = None) -> Tensor:
    """Tell which gradients are non-finite, which are zero, and which are zero but ``fooled``, bool ``[3, B]``."""
    # The largest element of a row is NaN if any element is.
    peak = torch.linalg.vector_norm(grad.detach().flatten(1), ord=torch.inf, dim=1)
    zero = peak == 0
    exempt = torch.zeros_like(zero) if fooled is None else zero & fooled
    return torch.stack([~(peak < torch.inf), zero & ~exempt, exempt])


# -- counts the gradients that an attack could not use, and the images that it did not move ----------------------------

#: The largest allowed shares of non-finite gradients, of zero gradients, and of unmoved images. If an attack exceeds
#: such a limit, it had no usable gradients, and its result says nothing about the defence.
MAX_NONFINITE, MAX_ZERO, MAX_UNMOVED = 0.0, 0.05, 0.01


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
