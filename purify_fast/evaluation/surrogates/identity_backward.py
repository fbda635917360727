"""Automatic BPDA: finds modules without a gradient inside a model, and gives them the identity's gradient.

The output of such a module must have the shape and about the range of its input (BPDA, Athalye, Carlini & Wagner, ICML
2018, section 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks import frozen
from ...protocols import Classifier
from .function_mode import Args, HoldingMode, Rule

#: A module is differentiated as the identity only if its output lies in the range of its input. The output may exceed
#: this range at each end by at most this share of the width of the range.
OUTSIDE = 0.1


class PassedThrough(HoldingMode):
    """A context in which modules have their usual output and the gradient of the identity.

    It is a function mode, because `purify_fast.attacks.checkpointed_steps` enters the same function modes again.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.modules = list(modules)
        self._given: dict[nn.Module, list[Tensor]] = {}

    def __torch_function__(self, func: Rule, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {}))

    def held(self, stack: contextlib.ExitStack) -> None:
        # Inside another ``with`` block of the same object, the hooks are already registered.
        for module in [] if self._open else self.modules:
            stack.callback(module.register_forward_pre_hook(self._before, prepend=True).remove)
            stack.callback(module.register_forward_hook(self._after).remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not _takes_images(args):
            return None
        self._given.setdefault(module, []).append(args[0])
        # The module may convert its input to NumPy, which refuses tensors that require gradients.
        return args[0].detach(), *args[1:]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not _takes_images(args):
            return None
        x = self._given[module].pop()
        return output.detach() + (x - x.detach()).to(output) if _like(output, x) else None


def blocking(model: Classifier, inside: Sequence[tuple[str, nn.Module]], x: Tensor) -> list[dict[str, nn.Module]]:
    """Find modules without a gradient whose output has the shape and about the range of their input."""
    named = {".".join(filter(None, (outer, name))): each for outer, m in inside for name, each in m.named_modules()}
    named = {name: module for name, module in named.items() if name and module is not model}
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module not in calls and _takes_images(args) and _like(output, args[0]) and _within(output, args[0]):
            calls[module] = args, kwargs

    # A user's model may raise any error on inputs for which it was not written.
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack, torch.no_grad():
        for module in dict.fromkeys(named.values()):
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        model(x)
    blocked = {name: module for name, module in named.items() if module in calls and _blocks(module, *calls[module])}
    inside_of = {name: {*list(module.modules())[1:]} for name, module in blocked.items()}
    innermost = {name: each for name, each in blocked.items() if not inside_of[name] & {*blocked.values()}}
    outermost = {name: each for name, each in blocked.items() if not any(each in other for other in inside_of.values())}
    return [group for group in (innermost, outermost)[: 1 + (innermost != outermost)] if group]


def _takes_images(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].dim() > 1


def _like(output: Any, x: Tensor) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.shape == x.shape


def _within(output: Tensor, x: Tensor) -> bool:
    """Tell whether an output is within the range of its input, widened by `OUTSIDE`."""
    least, most = x.aminmax()
    room = OUTSIDE * (most - least)
    return bool((output.amin() >= least - room) & (output.amax() <= most + room))


def _blocks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether the gradient through a module is missing, zero or not finite for every image."""
    gradient = None
    with contextlib.suppress(Exception), torch.enable_grad(), frozen(module):
        leaf = args[0].detach().clone().requires_grad_()
        output = module(leaf, *args[1:], **kwargs)
        gradient = torch.autograd.grad((output * torch.randn_like(output)).sum(), leaf, allow_unused=True)[0]
    if gradient is None:
        return True
    useless = (gradient == 0).flatten(1).all(1) | ~gradient.isfinite().flatten(1).all(1)
    return bool(useless.all())
