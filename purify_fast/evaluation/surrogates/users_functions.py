"""The identity's gradient for a user's own ``autograd.Function``."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from ..._tensors import per_image


@functools.lru_cache(maxsize=64)
def with_gradient(function: Any, always: bool) -> type:
    """Make a subclass of a user's ``autograd.Function`` with the gradient of the identity."""
    by_vjp = function.vjp is not torch.autograd.Function.vjp
    own = function.vjp if by_vjp else function.backward

    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        found: Any = None
        # A function that was never differentiated may have no backward, or a backward with errors.
        with contextlib.suppress(Exception):
            found = own(ctx, grad, *others)
        needed = ctx.needs_input_grad
        every = list(found) if isinstance(found, tuple) else [found] + [None] * (len(needed) - 1)
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        places = [place for place, need in enumerate(needed) if need]
        for place, (node, number) in zip(places, edges, strict=True):
            if grad is not None and node._input_metadata[number].shape == list(grad.shape):
                every[place] = grad if always or every[place] is None else _where_useful(every[place], grad)
                break
        return tuple(every)

    # The function has either `vjp` or `backward`, and this method is replaced.
    named = {"vjp" if by_vjp else "backward": staticmethod(backward), "__module__": "purify_fast"}
    return type(function.__name__, (function,), named)


def _where_useful(own: Tensor, other: Tensor) -> Tensor:
    """The gradient ``own``, or ``other`` for images where ``own`` is zero or not finite."""
    each = own.reshape(len(own), -1) if own.dim() else own.view(1, 1)
    useless = (each == 0).all(1) | ~each.isfinite().all(1)
    return torch.where(per_image(useless, own) if own.dim() else useless[0], other, own)
