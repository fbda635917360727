"""Functions of autograd around kernels, and kernels that save what their backward needs.

Applying an ``autograd.Function`` costs 16 microseconds on an AMD EPYC, several times a small kernel: a call from which
no gradient can flow goes to the kernel directly. A table in docs/performance.md has the parts of a call.

An op's own backward computes everything from the op's inputs, since on a GPU arithmetic is cheaper than memory. On a
CPU it is not: a sigmoid, a normal or a difference that forward had in a register costs one store to save and one load
to read, where backward would need dozens of instructions, or a second matrix to read. ``torch.compile`` saves them too.
So some ops have `cpu_kernel`s that save, for eager calls on a CPU. Their results are those of the op and of its
backward, to the last bit or two. They replace the op's own kernels wherever these would be used in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from ... import _library
from .registry import Op


def needs_gradient(*tensors: Tensor) -> bool:
    """Tell whether a derivative of a function of these tensors may be asked for.

    Args:
        tensors: the tensors in which the op is differentiable.

    Returns:
        True if gradients are recorded and a tensor requires one. Also true inside forward-mode differentiation, which
        the ops' functions refuse, where a bare kernel would lose the tangent without a word.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, without its cost if nobody asked for a second derivative.

    Args:
        backward: a function's ``backward(ctx, *grads)``.

    Returns:
        The same, which raises when its own result is differentiated and the incoming gradient requires one. Under
        ``create_graph=True`` the gradient of a plain sum is a constant, as ``once_differentiable`` leaves it: a penalty
        on gradients needs ``use_backend("reference")``.
    """
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        # Autograd records gradients in a backward pass only under create_graph=True.
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    saved: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]] = lambda inputs, outputs: inputs,
    constants: int = 0,
) -> Callable[..., Any]:
    """Make a function of autograd with first-order gradients from an op.

    Args:
        forward: from the inputs to one output or a tuple of them.
        backward: from the gradients of the outputs, then the tensors and then the settings that were saved, to the
            gradient of the first input, or a tuple of those of the first inputs; the others have none. A plain
            function: compilers cannot look into an op that a closure holds.
        saved: picks the arguments of backward from the inputs and the outputs, tensors first.
        constants: how many of the last outputs have no gradient.

    Returns:
        ``apply`` of the function.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if constants:
                ctx.mark_non_differentiable(*outputs[-constants:])
            if constants and len(outputs) == constants + 1:
                # Autograd would otherwise allocate zeros as gradients of the constant outputs, which may be large.
                ctx.set_materialize_grads(False)
            values = saved(inputs, outputs)
            ctx.save_for_backward(*[value for value in values if isinstance(value, Tensor)])
            ctx.settings = [value for value in values if not isinstance(value, Tensor)]
            ctx.inputs = len(inputs)

        @staticmethod
        @first_order
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            if grads[0] is None:
                return (None,) * ctx.inputs
            result = backward(*grads[: len(grads) - constants], *ctx.saved_tensors, *ctx.settings)
            result = result if isinstance(result, tuple) else (result,)
            return *result, *[None] * (ctx.inputs - len(result))

    apply: Callable[..., Any] = Function.apply
    return apply


def cpu_kernel(name: str, schema: str) -> Callable[..., Any]:
    """The handle of a kernel of the compiled extension that is not an op: it takes only tensors with data."""
    torch.library.define(f"purify_fast::{name}", schema)
    handle: Callable[..., Any] = getattr(torch.ops.purify_fast, name).default
    return handle


#: Multiplies each row of ``rows`` [B, ...] by its number in ``grad`` [B], and rounds the products to a dtype.
SCALED_ROWS = cpu_kernel("scaled_rows", "(Tensor grad, Tensor rows, ScalarType dtype) -> Tensor")
#: True if the extension is loaded and has these kernels.
SAVING_KERNELS = _library.has_kernel("purify_fast::scaled_rows", "CPU")


def transformed() -> bool:
    """Tell whether a call is inside a transform of ``torch.func``, eagerly.

    Transforms refuse functions of autograd whose ``forward`` takes the context. A function with ``setup_context`` in
    its place takes 20 us more per call, in which PyTorch inspects a signature.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def may_save(x: Tensor) -> bool:
    """Tell whether kernels that only a CPU has can be called.

    They cannot be on a GPU, in compiled graphs, in functorch's transforms, and with subclasses of tensors, such as
    those without data.
    """
    if not SAVING_KERNELS or x.device.type != "cpu" or type(x) not in (Tensor, Parameter):
        return False
    return not (torch.compiler.is_compiling() or transformed())


def saves(backward: Op, x: Tensor, variant: str = "") -> bool:
    """Tell whether a saving kernel replaces an op's forward: a kernel must serve its backward too."""
    return may_save(x) and not backward.uses_reference(x.device, x.dtype, x.numel(), variant)
