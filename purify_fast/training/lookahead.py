"""Lookahead around any optimizer (Zhang, Lucas, Hinton, Ba: NeurIPS 2019): k fast steps, then one slow step.

slow <- slow + alpha (fast - slow),   fast <- slow,   after every k-th step of the inner optimizer
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lookahead(torch.optim.Optimizer):
    """Steps ``inner``, and every k-th time pulls its weights back towards the slow ones; momenta are left alone.

    Args:
        inner: the optimizer of the fast weights. Its groups are this one's: learning rates are set on either.
        k: fast steps per slow step.
        alpha: length of the slow step, in (0, 1].

    The model holds the fast weights. What is evaluated and saved are the slow ones: `load_slow`, once at the end.

    Raises:
        ValueError: k below 1 or alpha outside (0, 1].
    """

    def __init__(self, inner: torch.optim.Optimizer, k: int = 6, alpha: float = 0.8):
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"need k >= 1 and 0 < alpha <= 1, got k = {k}, alpha = {alpha}")
        super().__init__([dict(group) for group in inner.param_groups], inner.defaults)
        self.inner, self.k, self.alpha, self.steps = inner, k, alpha, 0
        self.param_groups = inner.param_groups
        self._slow = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One fast step, and after every k-th a slow one.

        Args:
            closure: as of the inner optimizer.
        """
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            fast = self._parameters()
            torch._foreach_lerp_(self._slow, fast, self.alpha)
            torch._foreach_copy_(fast, self._slow)
        return loss

    @torch.no_grad()
    def load_slow(self) -> None:
        """Put the slow weights into the model; the fast ones since the last slow step are dropped."""
        torch._foreach_copy_(self._parameters(), self._slow)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the slow weights and the count of steps: all a resumed run needs."""
        return {"inner": self.inner.state_dict(), "slow": list(self._slow), "steps": self.steps}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; an optimizer's own state leaves out what is added to it."""
        own = {name: getattr(self, name) for name in ("inner", "k", "alpha", "steps", "_slow")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Args:
            state_dict: the inner optimizer's state, the slow weights and the count of steps.
        """
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.steps = self.inner.param_groups, state_dict["steps"]
        for mine, saved in zip(self._slow, state_dict["slow"], strict=True):
            mine.copy_(saved)
