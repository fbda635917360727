"""Computes the exact gradient of a long loop with the memory of a single step.

    x_{i+1} = step(x_i, i),  i = 0 .. n - 1;      g_i = (d x_{i+1} / d x_i)^T g_{i+1},  step by step from the last

The x_i are kept, and each step is computed again, except steps whose activations fit into the memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..ops.dispatch.gradient import first_order
from ..ops.dispatch.registry import forced_backends, use_backend
from ..speed.agreement import BFLOAT16
from ..speed.memory import free_memory, same_draws_again

Step = Callable[..., Tensor]
#: The number of steps whose activations are kept. "auto" keeps as many as fit into a share of the free memory.
Keep = int | Literal["auto"]
#: "auto" fills this share of the free memory with activations; the rest is for other computations and processes.
SHARE = 0.25
#: "auto" measures the activations of the last of this many steps: the first may keep less than the others.
MEASURED = 3
#: A result that is computed again may differ by the share BFLOAT16 of the step's change, and by this many units of
#: rounding of the largest value. A network in bfloat16 differs by less under another kernel, other draws by more.
ROUNDED = 64


def checkpointed_steps(
    step: Step, x: Tensor, n: int, *, parameters: Sequence[Tensor] = (), preserve_rng_state: bool = True, keep: Keep = 0
) -> Tensor:
    """Apply ``step`` n times. The gradient of the result needs only the memory of one step or of a few steps.

    Autocast and PyTorch's function modes are the same when a step is computed again. Inside ``torch.compile`` the loop
    is a plain loop.

    Args:
        step: a function ``step(x, i) -> Tensor`` of the previous result x and of i from 0 to n - 1. With the
            same x and random state it must return the same result. It must not write into x.
        x: the first x, such as images ``[B, C, H, W]``; any floating-point dtype.
        n: the number of steps, at least 0.
        parameters: other tensors that ``step`` uses and whose gradients are wanted, such as
            ``list(denoiser.parameters())``. Other tensors get no gradient.
        preserve_rng_state: whether a step that is computed again draws the same numbers from PyTorch's generators. It
            may be False if the steps draw no numbers. Draws from a generator of your own or from NumPy are never
            repeated, so such a step is refused unless ``keep`` is n.
        keep: number of last steps whose activations are kept, at least 0. "auto" keeps as many as fit into a quarter of
            the free memory, by the activations of the third step, and also those of the first three steps.

    Returns:
        The result of the last step. It has first-order gradients to x and ``parameters``.

    Raises:
        ValueError: n or keep is negative, or keep is neither a number nor "auto".
        RuntimeError: ``step`` writes into its x; or, in the backward pass, ``step`` records no gradient, or has another
            result than before. On a GPU the gradient is then NaN instead of this last error.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    check_keep(keep)
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    if not needed or torch.compiler.is_compiling():
        for i in range(n):
            x = step(x, i)
        return x
    first = min(n, MEASURED) if keep == "auto" else 0
    if keep == "auto":
        # The bytes of each storage that autograd keeps.
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            # The tensor is detached, because a node of autograd's graph that references its own result is never freed.
            return tensor.detach()

        before = 0
        for i in range(first):
            before = sum(kept.values())
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                x = _applied(step, x, i)
        keep = int(SHARE * free_memory(x.device)) // max(1, sum(kept.values()) - before)
    for i in range(first, n):
        repeats = i < n - keep
        x = _Repeated.apply(step, i, preserve_rng_state, x, *parameters) if repeats else _applied(step, x, i)
    return x


def _applied(step: Step, x: Tensor, i: int) -> Tensor:
    """Apply one step; RuntimeError if it wrote into its x."""
    version = x._version
    following = step(x, i)
    if x._version != version:
        raise RuntimeError(f"step must not write into its x, but step {i} did: call x = x.clone() before writing")
    return following


def check_keep(keep: object) -> None:
    """Raise ValueError if ``keep`` is neither "auto" nor a number of steps."""
    if keep != "auto" and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
        raise ValueError(f'keep must be "auto" or a number of steps, at least 0, got {keep!r}')


class _Repeated(torch.autograd.Function):
    """A step whose activations are not kept: the backward pass computes the step again."""

    @staticmethod
    def forward(ctx: Any, step: Step, i: int, draws: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        # A `DeviceContext` changes no result.
        ctx.modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
        ctx.step, ctx.i = step, i
        ctx.draw_again = same_draws_again(x.device) if draws else None
        kind, ctx.backends = x.device.type, ",".join(forced_backends()) or None
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        following = _applied(partial(_recorded, step) if ctx.modes else step, x, i)
        ctx.save_for_backward(x, following, *parameters)
        return following

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, before, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        # The step does not take its parameters as arguments, so they cannot be replaced by leaves.
        leaf = x.detach().requires_grad_(needed[0])
        with contextlib.ExitStack() as stack:
            if ctx.draw_again is not None:
                stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
                ctx.draw_again()
            # Autocast's cache is not used, because it may contain weights that were cast while no gradients were
            # recorded.
            autocast = torch.autocast(x.device.type, cache_enabled=False, **ctx.autocast)
            for block in (torch.enable_grad(), autocast, use_backend(ctx.backends), *ctx.modes):
                stack.enter_context(block)
            result = ctx.step(leaf, ctx.i)
        differs = _differs(result.detach(), before, x)
        if not differs.is_cuda and differs:
            fault = f"step must return the same result when it is computed again, but step {ctx.i} does not"
            advice = "does it draw from a generator of its own, or from NumPy? keep=n computes no step again"
            raise RuntimeError(f"{fault}: {advice}")
        if not result.requires_grad and not needed[0]:
            return (None,) * (3 + len(needed))
        inputs = [tensor for tensor, need in zip([leaf, *parameters], needed, strict=True) if need]
        parts = iter(torch.autograd.grad(result, inputs, grad, allow_unused=True))
        gradients = [next(parts) if need else None for need in needed]
        if differs.is_cuda:
            gradients = [None if part is None else part.masked_fill(differs, torch.nan) for part in gradients]
        return None, None, None, *gradients


def _differs(again: Tensor, before: Tensor, x: Tensor) -> Tensor:
    """Return True if a repeated result differs from the first by more than rounding, measured by the step's change."""
    if again.shape != before.shape or not before.numel():
        return torch.tensor(again.shape != before.shape)
    change = (before - x if before.shape == x.shape else before).abs().amax()
    rounding = torch.finfo(before.dtype).eps * before.abs().amax()
    return (again - before).abs().amax() > BFLOAT16 * change + ROUNDED * rounding


def _recorded(step: Step, x: Tensor, i: int) -> Tensor:
    """Apply a step with gradients recorded, because a function mode may change its result if none are recorded."""
    # Modes are disabled here, because they may replace the functions that detach tensors and enable gradients.
    with torch._C.DisableTorchFunction():
        before = torch.is_grad_enabled()
        leaf = x.detach().requires_grad_()
        torch._C._set_grad_enabled(True)
    try:
        following = step(leaf, i)
    finally:
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(before)
    with torch._C.DisableTorchFunction():
        return following.detach()
