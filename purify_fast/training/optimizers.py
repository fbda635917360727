"""Optimizers: their weights and rates, one kernel for all weights, and Lookahead around any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights that an optimizer moves."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group of every optimizer this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def fuse(optimizer: torch.optim.Optimizer, fused: bool) -> bool:
    """Let an optimizer take its step in one kernel for all of its weights, or as its constructor set it.

    A checkpoint may come from a run on another device, so its setting is ignored. An optimizer without such a kernel
    stays as it is.

    Returns:
        True if the optimizer takes its step in one kernel now.
    """
    defaults = optimizer.defaults
    special = isinstance(optimizer, Lookahead) or defaults.get("capturable") or defaults.get("differentiable")
    if "fused" not in defaults or special:
        return False
    fused = fused and all(weight.is_floating_point() for weight in weights_of(optimizer))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"], group["foreach"] = (True, False) if fused else (defaults["fused"], defaults["foreach"])
    # this also moves the counts of steps to where the kernel reads them
    optimizer.load_state_dict(state)
    return fused


class Lookahead(torch.optim.Optimizer):
    """Steps ``inner``, and every k-th time pulls its weights back towards the slow ones; momenta are left alone.

    slow <- slow + alpha (fast - slow),   fast <- slow,   after every k-th step (Zhang et al., NeurIPS 2019)

    Args:
        inner: the optimizer of the fast weights. Both share their groups: learning rates may be set on either.
        k: fast steps per slow step.
        alpha: length of the slow step, in (0, 1].

    The model holds the fast weights. The slow ones are evaluated and saved: `load_slow`, once at the end.

    Raises:
        ValueError: k below 1 or alpha outside (0, 1].
    """

    def __init__(self, inner: torch.optim.Optimizer, k: int = 6, alpha: float = 0.8):
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"need k >= 1 and 0 < alpha <= 1, got k = {k}, alpha = {alpha}")
        super().__init__([dict(group) for group in inner.param_groups], inner.defaults)
        self.inner, self.k, self.alpha, self.steps = inner, k, alpha, 0
        self.param_groups = inner.param_groups
        self._slow = [weight.detach().clone() for weight in weights_of(self)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a fast step, and after every k-th a slow step.

        Args:
            closure: the closure of the inner optimizer.
        """
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            torch._foreach_lerp_(self._slow, weights_of(self), self.alpha)
            self.load_slow()
        return loss

    @torch.no_grad()
    def load_slow(self) -> None:
        """Put the slow weights into the model; the fast ones since the last slow step are dropped."""
        torch._foreach_copy_(weights_of(self), self._slow)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the slow weights and the count of steps: all a resumed run needs."""
        return {"inner": self.inner.state_dict(), "slow": list(self._slow), "steps": self.steps}

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles; an optimizer's own state leaves out added attributes."""
        return vars(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from `state_dict`.

        Args:
            state_dict: the inner optimizer's state, the slow weights and the count of steps.
        """
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.steps = self.inner.param_groups, state_dict["steps"]
        for mine, saved in zip(self._slow, state_dict["slow"], strict=True):
            mine.copy_(saved)
