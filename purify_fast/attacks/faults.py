"""Tells which gradients an attack cannot use."""

from __future__ import annotations

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
