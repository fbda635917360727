"""The exact gradient of a long loop in the memory of one step.

    x_{i+1} = step(x_i, i),  i = 0 .. n - 1;      g_i = (d x_{i+1} / d x_i)^T g_{i+1},  step by step from the last

Plain autograd keeps the activations of all n steps. Here the x_i are kept, and each step is computed again when its
gradient is: once more the time of a forward pass, and the memory of one step plus one x for each. Nothing is
approximated, as by an adjoint equation or by leaving steps out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

Step = Callable[..., Tensor]


def checkpointed_steps(
    step: Step,
    x: Tensor,
    n: int,
    *,
    inputs: Sequence[Tensor] = (),
    parameters: Sequence[Tensor] = (),
    preserve_rng_state: bool = True,
) -> Tensor:
    """``step`` applied n times, differentiable with the memory of one step.

    Args:
        step: ``step(x, i, *inputs) -> Tensor``, x the result of the step before and i from 0 to n - 1. It must give the
            same when it is called again with the same x and the same state of PyTorch's random generators, and leave x
            as it is.
        x: where the loop starts, such as images ``[B, C, H, W]``; any floating-point dtype.
        n: how many steps, at least 0.
        inputs: tensors that every step takes besides x, and whose gradients are wanted, such as the image that guides.
        parameters: tensors that ``step`` reads by itself and whose gradients are wanted, such as
            ``list(denoiser.parameters())``. Whatever is in neither list gets no gradient.
        preserve_rng_state: whether a step that is computed again draws the same numbers from PyTorch's generators; to
            be switched off for steps that draw none. Draws from other sources, such as NumPy's, are not repeated.

    Returns:
        The result of the last step. Its gradient reaches x, ``inputs`` and ``parameters``; first order.

    Raises:
        ValueError: n is negative.
        RuntimeError: ``step`` writes into the x that it is given; in the backward pass, it records no gradient.

    Autocast is the same when a step is computed again, and so are PyTorch's function modes, which may give a step
    another gradient. Inside ``torch.compile`` the loop is a plain one.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *inputs, *parameters))
    if n == 0 or not wanted or torch.compiler.is_compiling():
        for i in range(n):
            x = step(x, i, *inputs)
        return x
    # positional because autograd functions take no keywords
    return _Steps.apply(step, n, preserve_rng_state, len(inputs), x, *inputs, *parameters)


def draws_numbers(function: Callable[[], object], device: torch.device) -> bool:
    """Whether a call takes numbers from PyTorch's generators, which are afterwards as they were.

    Args:
        function: what is called, once.
        device: where it computes.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _generators(device)
        function()
        pairs = zip(before, _generators(device), strict=True)
        return not all(a is None or torch.equal(a, cast(Tensor, b)) for a, b in pairs)


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, n: int, keep_rng: bool, count: int, x: Tensor, *others: Tensor) -> Tensor:
        states: list[Tensor] = []
        ctx.generators, ctx.modes = [], _function_modes()
        for i in range(n):
            states.append(x)
            version = x._version
            if keep_rng:
                ctx.generators.append(_generators(x.device))
            following = _recorded(step, x, i, others[:count]) if ctx.modes else step(x, i, *others[:count])
            if x._version != version:
                raise RuntimeError(f"step must leave the x that it is given as it is: step {i} wrote into it")
            x = following
        ctx.step, ctx.steps, ctx.count = step, n, count
        ctx.save_for_backward(*states, *others)
        kind = x.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sums: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 5)
        for i in reversed(range(ctx.steps)):
            to_x, *parts = _gradients_of_step(ctx, i, grad)
            if to_x is not None:
                grad = to_x
            for place, part in enumerate(parts):
                if part is not None:
                    before = sums[place]
                    sums[place] = part if before is None else before + part
        return None, None, None, None, grad if ctx.needs_input_grad[4] else None, *sums


def _gradients_of_step(ctx: Any, i: int, grad: Tensor) -> list[Tensor | None]:
    """Those of x and of each other tensor, from that of the step's result; None where none is wanted."""
    x, others = ctx.saved_tensors[i], ctx.saved_tensors[ctx.steps :]
    needed = [i > 0 or ctx.needs_input_grad[4], *ctx.needs_input_grad[5:]]
    # the parameters themselves, since the step reads them by itself
    given = [x, *others[: ctx.count]]
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(given, needed, strict=False)]
    # A cache of autocast may hold weights that were cast while nothing was recorded.
    autocast = torch.autocast(x.device.type, cache_enabled=False, **ctx.autocast)
    with contextlib.ExitStack() as stack:
        blocks = torch.enable_grad(), autocast, _drawing_from(ctx.generators[i : i + 1], x.device), *ctx.modes
        for block in blocks:
            stack.enter_context(block)
        result = ctx.step(leaves[0], i, *leaves[1:])
    if not result.requires_grad:
        if needed[0]:
            raise RuntimeError(f"step {i} records no gradient: it detaches its result, or runs under torch.no_grad()")
        return [None] * len(needed)
    tensors = [*leaves, *others[ctx.count :]]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(result, wanted, grad, allow_unused=True))
    gradients = [next(found) if need else None for need in needed]
    if needed[0] and gradients[0] is None:
        gradients[0] = torch.zeros_like(x)
    return gradients


def _function_modes() -> list[Any]:
    """The modes that act on what a step computes, from the outside in; where new tensors are placed changes nothing."""
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]


def _recorded(step: Step, x: Tensor, i: int, others: Sequence[Tensor]) -> Tensor:
    """A step as its gradient is computed: a mode may compute something else where gradients are recorded."""
    # the modes may change what detaches and what switches gradients on
    with torch._C.DisableTorchFunction():
        before = torch.is_grad_enabled()
        given = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in (x, *others)]
        torch._C._set_grad_enabled(True)
    try:
        following = step(given[0], i, *given[1:])
    finally:
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(before)
    with torch._C.DisableTorchFunction():
        return following.detach()


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the generators that a step on a device may draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _drawing_from(states: Sequence[tuple[Tensor, Tensor | None]], device: torch.device) -> Iterator[None]:
    """Within the block, the generators draw from the state that was kept, if one was; then they are where they were."""
    if not states:
        yield
        return
    cpu, cuda = states[0]
    with torch.random.fork_rng([device] if cuda is not None else []):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
