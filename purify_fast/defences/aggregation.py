"""A randomised defence through another aggregation than its own."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from ..ops.aggregate import aggregate


class Head(nn.Module):
    """A defence seen through one aggregation method, and with z = 0 if asked: something to attack or to compare.

    Args:
        defence: a module with ``sample_logits(x) -> [B, K, classes]`` and, if z = 0 is asked for, ``deterministic()``;
            its ``draw_sample_logits`` is used if it has one (`Randomised` has all three).
        method: of `purify_fast.ops.aggregate`. deterministic: whether z = 0.
    """

    def __init__(self, defence, method: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.method, self.zero = defence, method, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, classes]``."""
        with self._mode():
            return aggregate(self.defence.sample_logits(x), self.method)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """``draws`` independent calls at once, ``[draws, B, classes]``; attacks with EOT use it."""
        if not hasattr(self.defence, "draw_sample_logits"):
            return self(x.repeat(draws, *[1] * (x.dim() - 1))).unflatten(0, (draws, -1))
        with self._mode():
            logits = self.defence.draw_sample_logits(x, draws)
            return aggregate(logits.flatten(0, 1), self.method).unflatten(0, (draws, -1))

    def _mode(self) -> contextlib.AbstractContextManager:
        return self.defence.deterministic() if self.zero else contextlib.nullcontext()
