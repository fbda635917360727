"""Give ops their gradients: autograd functions around kernels, and CPU kernels that save values for the backward.

An op's own backward computes everything from the op's inputs, because on a GPU arithmetic is cheaper than memory
accesses. On a CPU it is not, so some ops have `cpu_kernel`s that save values, for eager calls on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from ... import _library
from .examples import Example, normal, properties_of, tensors
from .registry import Op, define_op, forced_backends, use_backend


def needs_gradient(*tensors: Tensor) -> bool:
    """Return True if a derivative of a function of these tensors may be needed."""
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True`` in an autograd function that has no second derivative."""

    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        # Autograd records gradients in a backward pass only under create_graph=True, and inside torch.func.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if transformed():
            return guarded(ctx, *grads)
        advice = 'run the forward pass within purify_fast.ops.use_backend("reference")'
        raise RuntimeError(f"this kernel has no second derivative, so create_graph=True is refused: {advice}")

    return run


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    saved: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]] = lambda inputs, outputs: inputs,
    constants: int = 0,
) -> Callable[..., Any]:
    """Make an autograd function with first-order gradients from an op."""

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
            ctx.inputs, ctx.backends = len(inputs), forced_backends()

        @staticmethod
        @first_order
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            if grads[0] is None:
                return (None,) * ctx.inputs
            # PyTorch may run a backward in a thread of its own, which does not have the choice of the forward.
            if ctx.backends != forced_backends():
                with use_backend(",".join(ctx.backends) or None):
                    return Function.backward(ctx, *grads)
            result = backward(*grads[: len(grads) - constants], *ctx.saved_tensors, *ctx.settings)
            result = result if isinstance(result, tuple) else (result,)
            return *result, *[None] * (ctx.inputs - len(result))

    apply: Callable[..., Any] = Function.apply
    return apply


def cpu_kernel(name: str, schema: str) -> Callable[..., Any]:
    """Return the handle of a kernel of the extension that is not an op. Without a fake, it needs tensors with data."""
    torch.library.define(f"purify_fast::{name}", schema)
    handle: Callable[..., Any] = getattr(torch.ops.purify_fast, name).default
    return handle


#: Multiplies each row of ``rows`` [B, ...] by its number in ``grad`` [B], and rounds the products to a dtype.
SCALED_ROWS = cpu_kernel("scaled_rows", "(Tensor grad, Tensor rows, ScalarType dtype) -> Tensor")
#: True if the extension is loaded and has kernels whose forward saves values for the backward.
SAVING_KERNELS = _library.has_kernel("purify_fast::scaled_rows", "CPU")


def transformed() -> bool:
    """Return True if an eager call is inside a transform of ``torch.func``."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def may_save(x: Tensor) -> bool:
    """Return True if kernels that exist only for a CPU can be called."""
    if not SAVING_KERNELS or x.device.type != "cpu" or type(x) not in (Tensor, Parameter):
        return False
    return not (torch.compiler.is_compiling() or transformed())


def saves(backward: Op, x: Tensor, variant: str = "") -> bool:
    """Return True if CPU kernels compute an op and its ``backward``, the first saving numbers for the second."""
    return may_save(x) and not backward.uses_reference(x.device, x.numel(), variant)


# -- registers the backward of an op -----------------------------------------------------------------------------------


def define_backward(
    op: Op,
    schema: str,
    *,
    reference: Callable,
    fake: Callable = lambda grad, x, *_: x.new_empty(x.shape),
    size: Callable[..., int] = lambda _, x, *__: x.numel(),
    saved: Callable[[tuple, tuple], tuple] = lambda inputs, outputs: inputs,
    constants: int = 0,
    changes: dict[str, Any] | None = None,
    **flags: Any,
) -> Op:
    """Register the backward of an op. ``saved`` makes the arguments that follow the gradients.

    ``flags`` are the arguments ``cpu``, ``cuda`` and ``in_graphs`` that differ from those of the op.
    """

    def derived(example: Example) -> Example:
        def make(dtype: torch.dtype, seed: int) -> tuple:
            inputs = example.make(dtype, seed)
            outputs = tensors(op.reference(*inputs))
            changing = enumerate(outputs[: len(outputs) - constants])
            grads = [torch.empty_like(tensor).copy_(normal(seed + 500 + i, *tensor.shape)) for i, tensor in changing]
            return *grads, *saved(inputs, outputs)

        return replace(example, make=make, **properties_of(example.setting, changes or {}))

    return define_op(
        f"{op.name}_backward",
        schema,
        reference=reference,
        fake=fake,
        examples=[derived(example) for example in op.examples],
        size=size,
        **op.smallest | {"in_graphs": op.in_graphs} | flags,
    )
