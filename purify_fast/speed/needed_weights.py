"""The gradients of weights in a call of an accelerated module, if a backward pass asks for them."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .folding.inference_copy import InferenceCopy


class Owner(Protocol):
    """The forward of an accelerated module (`purify_fast.speed.accelerate`), as far as a call uses it."""

    model: nn.Module
    copy: InferenceCopy | None
    asked: bool

    def plain(self, x: Tensor) -> Tensor:
        """Run the module itself."""

    def running_plainly(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the module and its parts run as they are."""


class _Asked:
    """The gradients of weights between the two functions of a call."""

    node: Any = None
    weights: tuple[nn.Parameter, ...] = ()
    gradients: tuple[Tensor | None, ...] = ()


class _Weights(torch.autograd.Function):
    """A number that depends on all weights. Its backward passes the gradients on that `_Call` has computed."""

    @staticmethod
    def forward(ctx: Any, asked: _Asked, *weights: Tensor) -> Tensor:
        ctx.asked, ctx.number = asked, len(weights)
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *(ctx.asked.gradients or (None,) * ctx.number)


class _Call(torch.autograd.Function):
    """A call of the copy. For gradients of weights, or a second derivative, the module itself is called again."""

    @staticmethod
    def forward(ctx: Any, owner: Owner, asked: _Asked, known: Tensor | None, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.owner, ctx.asked = owner, asked
        # Autograd raises an error if a weight was changed between forward and backward.
        ctx.save_for_backward(x, *weights[1:])
        if known is not None:
            return known.clone()
        assert owner.copy is not None
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.out = owner.copy(ctx.leaf)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The weights are saved only so that autograd checks them.
        x, *saved = ctx.saved_tensors
        owner, asked, images = ctx.owner, ctx.asked, ctx.needs_input_grad[3]
        wanted = torch._C._will_engine_execute_node(asked.node)
        of_images, nothing = None, (None,) * len(saved)
        if not wanted and not torch.is_grad_enabled():
            of_images = torch.autograd.grad(ctx.out, ctx.leaf, grad, retain_graph=True)[0]
            return None, None, None, of_images, None, *nothing
        if wanted and not owner.asked:
            owner.asked = True
            warnings.warn(
                f"a backward pass asked for gradients of the weights of {type(owner.model).__name__} in evaluation "
                "mode, so the model itself runs from now on: in an attack, use torch.autograd.grad or "
                "purify_fast.images_only",
                RuntimeWarning,
                stacklevel=2,
            )
        again = torch.is_grad_enabled()
        with torch.enable_grad(), owner.running_plainly():
            leaf = x if again else x.detach().requires_grad_(images)
            out = owner.plain(leaf)
            inputs = ([leaf] if images else []) + (list(asked.weights) if wanted else [])
            found = torch.autograd.grad(out, inputs, grad, create_graph=again, allow_unused=True)
        of_images = found[0] if images else None
        asked.gradients = found[1:] if images else found
        return None, None, None, of_images, grad.new_zeros(()), *nothing


def with_weights(owner: Owner, x: Tensor, weights: list[nn.Parameter], known: Tensor | None) -> Tensor:
    """Return the logits of images as a function of the images and of the weights."""
    asked = _Asked()
    asked.weights = tuple(weights)
    number = _Weights.apply(asked, *weights)
    asked.node = number.grad_fn
    result: Tensor = _Call.apply(owner, asked, known, x, number, *(one.detach() for one in weights))
    return result
