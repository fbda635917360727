"""Helpers for optimizers: their weights, learning rates and fused kernels; and Lookahead, which wraps an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..protocols import supports

#: The entry of a parameter group with its relative rate. Checkpoints save it with the group.
RELATIVE = "relative_rate"


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the weights that an optimizer changes."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def within(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it holds in its attributes, from the outside to the inside."""
    held = [optimizer]
    for outer in held:
        held += [inner for inner in vars(outer).values() if isinstance(inner, Optimizer) and inner not in held]
    return held


def check_groups(optimizer: Optimizer) -> None:
    """Raise ValueError if an optimizer holds another one whose parameter groups are others.

    The learning rates that are written into the outer groups would not reach the weights.
    """
    groups = set(map(id, optimizer.param_groups))
    for item in within(optimizer):
        if not groups.issuperset(map(id, item.param_groups)):
            outer, inner = type(optimizer).__name__, type(item).__name__
            raise ValueError(f"optimizer {outer} must share its param_groups with the {inner} that it holds")


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group of every optimizer, see `relative_rates`."""
    for optimizer in optimizers:
        for group, share in zip(optimizer.param_groups, relative_rates(optimizer), strict=True):
            group["lr"] = rate * share


def relative_rates(optimizer: Optimizer) -> list[float]:
    """Return each parameter group's first learning rate as a share of the largest, and keep it in the group.

    A schedule is that of the largest rate, and changes the rates of all groups in proportion.
    """
    groups = optimizer.param_groups
    # A schedule of PyTorch keeps the first rate in this entry, and has already changed the rate.
    first = [float(group.get("initial_lr", group["lr"])) for group in groups]
    for group, rate in zip(groups, first, strict=True):
        group.setdefault(RELATIVE, 1.0 if rate == max(first) else rate / max(first))
    return [group[RELATIVE] for group in groups]


def fuse(optimizer: Optimizer, fused: bool) -> None:
    """Let an optimizer update all of its weights in one kernel if ``fused``; otherwise use its constructor's setting.

    The setting in a checkpoint is ignored, because the checkpoint may come from a run on another device. An optimizer
    without a fused kernel is not changed; of one around another, the inner one is.
    """
    innermost = within(optimizer)[-1]
    defaults = getattr(innermost, "defaults", {})
    if "fused" not in defaults:
        return
    fused = fused and all(weight.is_floating_point() for weight in weights_of(innermost))
    for group in innermost.param_groups:
        group["fused"], group["foreach"] = (True, False) if fused else (defaults["fused"], defaults["foreach"])
    for weight, own in innermost.state.items():
        for name, value in own.items():
            # A fused kernel reads memory in its order, and a checkpoint has contiguous tensors.
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                own[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
            elif fused and name == "step":
                own[name] = torch.as_tensor(value, dtype=torch.float32, device=weight.device)


def state_of(optimizer: Optimizer) -> Any:
    """Return the state of an optimizer, with those of the optimizers that it holds."""
    # PyTorch's own method leaves them out.
    leaves_out = type(optimizer).state_dict is Optimizer.state_dict
    states = [item.state_dict() for item in (within(optimizer) if leaves_out else [optimizer])]
    return states if len(states) > 1 else states[0]


def load_state(optimizer: Optimizer, state: Any) -> None:
    """Load a state of `state_of`. The groups stay the same objects, because optimizers around others share them."""
    before = [(item, item.param_groups) for item in within(optimizer)]
    for (item, _), own in zip(before, state if isinstance(state, list) else [state], strict=False):
        item.load_state_dict(own)
    for item, groups in before:
        for group, loaded in zip(groups, item.param_groups, strict=True):
            group.update(loaded)
        item.param_groups = groups


def set_modes(optimizers: Iterable[Optimizer], training: bool) -> None:
    """Call ``train()`` or ``eval()`` of optimizers that have them, because the weights to predict with are others."""
    name = "train" if training else "eval"
    for item in (inner for outer in optimizers for inner in within(outer)):
        if supports(item, name):
            getattr(item, name)()


class Lookahead(Optimizer):
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

    def __init__(self, inner: Optimizer, k: int = 6, alpha: float = 0.8):
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
        for slow, saved in zip(self._slow, state_dict["slow"], strict=True):
            slow.copy_(saved)
