"""A randomized defence through another aggregation than its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from .._tensors import repeat_batch
from ..ops.aggregate import aggregate
from ..protocols import Classifier, DrawsSampleLogits


class WithAggregation(nn.Module):
    """A defence seen through one aggregation, and without noise if asked: something to attack or to compare.

    Args:
        defence: a module with ``sample_logits(x) -> [B, K, classes]`` and, if ``deterministic`` is asked for,
            ``deterministic()``. Its ``draw_sample_logits`` is used if it has one (`StochasticDefence` has all three).
        aggregation: a method of `purify_fast.ops.aggregate`.
        deterministic: whether the defence is run without noise.
    """

    def __init__(self, defence: nn.Module, aggregation: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.aggregation, self.without_noise = defence, aggregation, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``.

        Args:
            x: images ``[B, C, H, W]``.
        """
        with self._mode():
            return aggregate(self.defence.sample_logits(x), self.aggregation)  # type: ignore[operator]

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """``draws`` independent calls at once, ``[draws, B, classes]``; attacks with EOT use it.

        Args:
            x: images ``[B, C, H, W]``.
            draws: number of calls.
        """
        if not isinstance(self.defence, DrawsSampleLogits):
            return self(repeat_batch(x, draws)).unflatten(0, (draws, -1))
        with self._mode():
            logits = self.defence.draw_sample_logits(x, draws)
            return aggregate(logits.flatten(0, 1), self.aggregation).unflatten(0, (draws, -1))

    def around(self, replace: Callable[[Classifier], Classifier]) -> WithAggregation:
        """The same view of another defence.

        Args:
            replace: makes that defence of the one inside.
        """
        # a copy of this object, which may be of a subclass and have hooks
        other = copy.copy(self)
        other._modules = {**self._modules, "defence": cast(nn.Module, replace(self.defence))}
        return other

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return self.defence.deterministic() if self.without_noise else contextlib.nullcontext()  # type: ignore[operator]
