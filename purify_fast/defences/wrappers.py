"""Modules around a random model: with another aggregation, and with a majority vote."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._tensors import repeat_batch
from ..ops.aggregate import aggregate
from ..protocols import Classifier, DrawsSampleLogits, SharesDraws, supports
from .stochastic import majority

M = TypeVar("M", bound=nn.Module)


def _with_part(module: M, name: str, part: Any) -> M:
    """Copy a module, which may have hooks and may be of a subclass, with another attribute."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    setattr(other, name, part)
    return other


class WithAggregation(nn.Module):
    """Calls a defence with another aggregation, with or without noise, for attacks and comparisons.

    Args:
        defence: module with a method ``sample_logits(x) -> [B, K, classes]``, such as a `StochasticDefence`. If
            deterministic is True, it also needs a method ``deterministic()``. Its method ``draw_sample_logits``, if
            any, is used.
        aggregation: a method of `purify_fast.ops.aggregate`.
        deterministic: whether to run the defence without noise.
    """

    def __init__(self, defence: nn.Module, aggregation: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.aggregation, self.without_noise = defence, aggregation, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        with self._mode():
            return self.aggregate(self.defence.sample_logits(x))  # type: ignore[operator]

    def aggregate(self, logits: Tensor) -> Tensor:
        """Aggregate logits ``[B, K, classes]``: ``[B, classes]``."""
        return aggregate(logits, self.aggregation)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute the logits of ``draws`` independent calls together, ``[draws, B, classes]``, for attacks with EOT."""
        if not isinstance(self.defence, DrawsSampleLogits):
            return self(repeat_batch(x, draws)).unflatten(0, (draws, -1))
        with self._mode():
            logits = self.defence.draw_sample_logits(x, draws)
            return self.aggregate(logits.flatten(0, 1)).unflatten(0, (draws, -1))

    def around(self, replace: Callable[[Classifier], Classifier]) -> WithAggregation:
        """Make a copy of this object that calls ``replace(defence)``."""
        return _with_part(self, "defence", replace(self.defence))

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return self.defence.deterministic() if self.without_noise else contextlib.nullcontext()  # type: ignore[operator]


class MajorityVote(nn.Module):
    """Predicts with the `majority` of several draws of a random model.

    Args:
        model: function or module from images ``[B, C, H, W]`` to logits ``[B, classes]``. If the model has a method
            ``draw_logits``, this method is used.
        draws: number of draws, at least 1.
    """

    def __init__(self, model: Classifier, draws: int):
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]``, in float32, or in float64 if the model computes in float64."""
        if supports(self.model, SharesDraws):
            logits = cast(SharesDraws, self.model).draw_logits(x, self.draws)
        else:
            # Call the model separately for each draw, because it may use the same draw for all images of a call.
            logits = torch.stack([self.model(x) for _ in range(self.draws)])
        return majority(logits)

    def around(self, replace: Callable[[Classifier], Classifier]) -> MajorityVote:
        """Make a copy of this object that calls ``replace(model)``."""
        return _with_part(self, "model", replace(self.model))
