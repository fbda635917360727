"""A randomised defence through another aggregation than its own."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from ..ops.aggregate import aggregate


class Head(nn.Module):
    """A defence seen through one aggregation method, and with z = 0 if asked: something to attack or to compare.

    Args:
        defence: a module with ``sample_logits(x) -> [B, K, classes]`` and, if z = 0 is asked for, ``deterministic()``.
        method: of `purify_fast.ops.aggregate`. deterministic: whether z = 0.
    """

    def __init__(self, defence, method: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.method, self.zero = defence, method, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, classes]``."""
        with self.defence.deterministic() if self.zero else contextlib.nullcontext():
            return aggregate(self.defence.sample_logits(x), self.method)
