"""The exact gradient of a long loop in the memory of one step.

    x_{i+1} = step(x_i, i),  i = 0 .. n - 1;      g_i = (d x_{i+1} / d x_i)^T g_{i+1},  step by step from the last

Plain autograd keeps the activations of all n steps. Here the x_i are kept, and each step is computed again for its
gradient. That takes the time of another forward pass, and the memory of one step plus one x per step. The activations
of some steps may be kept, as many as memory allows: these steps are not computed again. Nothing is approximated, in
contrast to an adjoint equation or to leaving steps out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..speed.memory import free_memory

Step = Callable[..., Tensor]
#: The number of steps whose activations are kept; "auto": as many as fit into a share of the free memory.
Keep = int | Literal["auto"]
#: "auto" fills this share of the free memory with activations. The rest is for other computations, such as a
#: classifier, and for other processes.
SHARE = 0.25
#: "auto" measures the memory of one step on this many first steps, and uses the last of them: the first step may keep
#: less than the others.
MEASURED = 3


def checkpointed_steps(
    step: Step,
    x: Tensor,
    n: int,
    *,
    inputs: Sequence[Tensor] = (),
    parameters: Sequence[Tensor] = (),
    preserve_rng_state: bool = True,
    keep: Keep = 0,
) -> Tensor:
    """``step`` applied n times, differentiable with the memory of one step, or of as many as are kept.

    Args:
        step: ``step(x, i, *inputs) -> Tensor``, x the result of the step before and i from 0 to n - 1. It must give the
            same when it is called again with the same x and the same state of PyTorch's random generators, and leave x
            as it is.
        x: where the loop starts, such as images ``[B, C, H, W]``; any floating-point dtype.
        n: how many steps, at least 0.
        inputs: tensors that every step takes besides x, and whose gradients are wanted, such as the image that guides.
        parameters: tensors that ``step`` reads by itself and whose gradients are wanted, such as
            ``list(denoiser.parameters())``. A tensor in neither list gets no gradient.
        preserve_rng_state: whether a step that is computed again draws the same numbers from PyTorch's generators; to
            be switched off for steps that draw none. Draws from other sources, such as NumPy's, are not repeated.
        keep: the number of last steps whose activations are kept, so that they are not computed again; at least 0.
            "auto": as many as fit into a quarter of the memory that is free now. The activations of the third step are
            measured for that; those of the first three steps are always kept.

    Returns:
        The result of the last step. Its gradient reaches x, ``inputs`` and ``parameters``; first order.

    Raises:
        ValueError: n or keep is negative, or keep is no number and not "auto".
        RuntimeError: ``step`` writes into the x that it is given; in the backward pass, it records no gradient.

    Autocast is the same when a step is computed again, and so are PyTorch's function modes, which may give a step
    another gradient. Inside ``torch.compile`` the loop is a plain one.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    check_keep(keep)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *inputs, *parameters))
    if n == 0 or not wanted or torch.compiler.is_compiling():
        for i in range(n):
            x = step(x, i, *inputs)
        return x
    first = 0
    if keep == "auto":
        counted = _Kept()
        while first < min(n, MEASURED):
            with counted:
                x = _applied(step, x, first, inputs)
            first += 1
        keep = _room(x.device) // max(1, counted.last)
    again = max(0, n - first - keep)
    if again:
        # The arguments are positional, because autograd functions take no keywords.
        x = _Steps.apply(step, first, again, preserve_rng_state, len(inputs), x, *inputs, *parameters)
    for i in range(first + again, n):
        x = _applied(step, x, i, inputs)
    return x


def _applied(step: Step, x: Tensor, i: int, inputs: Sequence[Tensor]) -> Tensor:
    """One step; RuntimeError if it wrote into its x."""
    version = x._version
    following = step(x, i, *inputs)
    if x._version != version:
        raise RuntimeError(f"step must not write into its x, but step {i} did: call x = x.clone() before writing")
    return following


def _room(device: torch.device) -> int:
    """Bytes of activations that may be kept."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Nothing is kept in a captured step: a CUDA graph keeps its memory for as long as it exists, and the driver
        # must not be asked for the free memory during a capture.
        return 0
    return int(SHARE * free_memory(device, None))


def check_keep(keep: object) -> None:
    """ValueError unless ``keep`` is "auto" or a number of steps.

    Args:
        keep: the value to check.
    """
    if keep != "auto" and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
        raise ValueError(f'keep must be "auto" or a number of steps, at least 0, got {keep!r}')


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the computations within the block; each storage once.

    Attributes:
        last: the bytes of the last block that earlier ones did not keep, as they keep weights.
    """

    def __init__(self) -> None:
        super().__init__(self._count, lambda kept: kept)
        self.seen: set[int] = set()
        self.last = 0

    def __enter__(self) -> None:
        self.last = 0
        super().__enter__()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.last += storage.nbytes()
        # The tensor is detached, because a node of autograd's graph that refers to its own result would never be freed.
        return tensor.detach()


def draws_numbers(function: Callable[[], object], device: torch.device) -> bool:
    """Tell whether a call takes numbers from PyTorch's generators; they are restored afterwards.

    Args:
        function: the function, which is called once.
        device: the device on which it computes.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _generators(device)
        function()
        return not all(map(torch.equal, before, _generators(device)))


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Step, first: int, n: int, keep_rng: bool, count: int, x: Tensor, *others: Tensor
    ) -> Tensor:
        states: list[Tensor] = []
        ctx.generators, ctx.modes = [], _function_modes()
        applied = partial(_recorded, step) if ctx.modes else step
        for i in range(first, first + n):
            states.append(x)
            if keep_rng:
                ctx.generators.append(_generators(x.device))
            x = _applied(applied, x, i, others[:count])
        ctx.step, ctx.first, ctx.steps, ctx.count = step, first, n, count
        ctx.save_for_backward(*states, *others)
        kind = x.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sums: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 6)
        for i in reversed(range(ctx.steps)):
            to_x, *parts = _gradients_of_step(ctx, i, grad)
            grad = grad if to_x is None else to_x
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, parts, strict=True)]
        return *[None] * 5, grad if ctx.needs_input_grad[5] else None, *sums


def _gradients_of_step(ctx: Any, i: int, grad: Tensor) -> list[Tensor | None]:
    """The gradients of x and of each other tensor, from that of the i-th result; None for unwanted gradients."""
    x, others = ctx.saved_tensors[i], ctx.saved_tensors[ctx.steps :]
    needed = [i > 0 or ctx.needs_input_grad[5], *ctx.needs_input_grad[6:]]
    # The step reads its parameters by itself, so they cannot be replaced by leaves.
    given = [x, *others[: ctx.count]]
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(given, needed, strict=False)]
    # Autocast's cache is off, because it may contain weights that were cast while no gradients were recorded.
    autocast = torch.autocast(x.device.type, cache_enabled=False, **ctx.autocast)
    draws = [_drawing_from(states, x.device) for states in ctx.generators[i : i + 1]]
    with contextlib.ExitStack() as stack:
        for block in (torch.enable_grad(), autocast, *draws, *ctx.modes):
            stack.enter_context(block)
        result = ctx.step(leaves[0], ctx.first + i, *leaves[1:])
    if not result.requires_grad:
        if needed[0]:
            raise RuntimeError(
                f"step must record gradients, but step {ctx.first + i} does not: remove its detach() or torch.no_grad()"
            )
        return [None] * len(needed)
    tensors = [*leaves, *others[ctx.count :]]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(result, wanted, grad, allow_unused=True))
    gradients = [next(found) if need else None for need in needed]
    if needed[0] and gradients[0] is None:
        gradients[0] = torch.zeros_like(x)
    return gradients


def _function_modes() -> list[Any]:
    """The modes that change a step's results, from the outside in; the device of new tensors changes no result."""
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]


def _recorded(step: Step, x: Tensor, i: int, *others: Tensor) -> Tensor:
    """A step as its gradient is computed: a mode may compute something else where gradients are recorded."""
    # Modes are switched off here, because they may replace the functions that detach tensors and switch gradients on.
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


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the generators that a step on a device may draw from: the host's, then a GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def _drawing_from(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Within the block, the generators draw from the kept states; they are restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)
        yield
