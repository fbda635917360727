"""Helpers for optimizers: their weights, learning rates and fused kernels; and Lookahead, which wraps an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: The entry of a parameter group with its relative rate. Checkpoints save it with the group.
RELATIVE = "relative_rate"


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the weights that an optimizer changes."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group of every optimizer, see `relative_rates`."""
    for optimizer in optimizers:
        for group, share in zip(optimizer.param_groups, relative_rates(optimizer), strict=True):
            group["lr"] = rate * share


def relative_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return each parameter group's first learning rate relative to the optimizer's, and keep it in the group.

    A schedule changes the rates of all groups in proportion. If no group has the optimizer's own rate, the largest rate
    takes its place. Equal rates give 1.
    """
    groups = optimizer.param_groups
    # A schedule of PyTorch keeps the first rate in this entry, and has already changed the rate.
    first = [float(group.get("initial_lr", group["lr"])) for group in groups]
    own = float(optimizer.defaults.get("lr", max(first)))
    own = own if own in first else max(first)
    for group, rate in zip(groups, first, strict=True):
        group.setdefault(RELATIVE, 1.0 if rate == own else rate / own)
    return [group[RELATIVE] for group in groups]


def fuse(optimizer: torch.optim.Optimizer, fused: bool) -> None:
    """Let an optimizer update all of its weights in one kernel if ``fused``; otherwise use its constructor's setting.

    The setting in a checkpoint is ignored, because the checkpoint may come from a run on another device. An optimizer
    without a fused kernel is not changed.
    """
    defaults = optimizer.defaults
    if "fused" not in defaults or isinstance(optimizer, Lookahead):
        return
    fused = fused and all(weight.is_floating_point() for weight in weights_of(optimizer))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"], group["foreach"] = (True, False) if fused else (defaults["fused"], defaults["foreach"])
    # Loading the state also moves the counts of steps to the device on which the kernel reads them.
    optimizer.load_state_dict(state)
    for weight, own in optimizer.state.items():
        for name, value in own.items():
            # A fused kernel reads memory in its order, and a checkpoint has contiguous tensors.
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                own[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Lookahead(torch.optim.Optimizer):
    """The Lookahead optimizer (Zhang et al., NeurIPS 2019), which keeps slow weights beside those of another optimizer.

    slow <- slow + alpha (fast - slow),   fast <- slow,   after every k-th step of ``inner``

    The momenta of ``inner`` are not changed. The model holds the fast weights. Call `load_slow` once at the end of the
    training, because the slow weights are the result.

    Args:
        inner: the optimizer of the fast weights. Both optimizers share their parameter groups, so a learning rate that
            is set on one holds for the other too.
        k: fast steps per slow step.
        alpha: length of the slow step, in (0, 1].

    Raises:
        ValueError: k is below 1, or alpha is outside (0, 1].
    """

    def __init__(self, inner: torch.optim.Optimizer, k: int = 6, alpha: float = 0.8):
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"k must be at least 1 and alpha in (0, 1], got k = {k}, alpha = {alpha}")
        super().__init__([dict(group) for group in inner.param_groups], inner.defaults)
        self.inner, self.k, self.alpha, self.steps = inner, k, alpha, 0
        self.param_groups = inner.param_groups
        self._slow = [weight.detach().clone() for weight in weights_of(self)]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles. torch's own method would omit the attributes of this class."""
        return vars(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a fast step, and after every k-th fast step a slow step. ``closure`` is that of the inner optimizer."""
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            torch._foreach_lerp_(self._slow, weights_of(self), self.alpha)
            self.load_slow()
        return loss

    @torch.no_grad()
    def load_slow(self) -> None:
        """Put the slow weights into the model. The fast steps since the last slow step are lost."""
        torch._foreach_copy_(weights_of(self), self._slow)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, the slow weights and the count of steps."""
        return {"inner": self.inner.state_dict(), "slow": list(self._slow), "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.steps = self.inner.param_groups, state_dict["steps"]
        for mine, saved in zip(self._slow, state_dict["slow"], strict=True):
            mine.copy_(saved)
