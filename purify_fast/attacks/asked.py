"""Models are asked about images that they must leave as they are: one that writes to them moves an attack's points."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Answer = TypeVar("Answer")

#: By how much two answers may differ through rounding: of how far the logits of an image lie apart,
SAME_SPREAD = 1e-5
#: and of the largest logit, about 16 times the rounding of float32.
SAME_SIZE = 2e-6


class WritesToItsInput(ValueError):
    """A model changed the images that it was given."""

    def __init__(self) -> None:
        super().__init__(
            "the model writes to the images that it is given, which are the attack's own: let it work on a copy, such "
            "as x = x.clone() before the first operation in place (x.mul_(), x.clamp_(), x += ..., x[...] = ...)"
        )


def ask(model: Callable[[Tensor], Answer], x: Tensor) -> Answer:
    """What a model returns for images; to look whether it wrote to them costs nothing.

    PyTorch counts the writes to a tensor, but for those through ``x.data`` or a NumPy array of the same memory.

    Args:
        model: images to anything.
        x: images ``[B, ...]``. If the model writes to them they are changed: give a copy of what must not be.

    Returns:
        What the model returned.

    Raises:
        WritesToItsInput: the model wrote to the images, or tried to while gradients to them were recorded.
    """
    # a compiler cannot trace the count of writes, and inference tensors have none
    if torch.compiler.is_compiling() or x.is_inference():
        return model(x)
    writes = x._version
    try:
        answer = model(x)
    except RuntimeError as error:
        # parameters are frozen: no other leaf asks for gradients
        if "leaf Variable that requires grad is being used in an in-place operation" in str(error):
            raise WritesToItsInput from error
        raise
    if x._version != writes:
        raise WritesToItsInput
    return answer


def check_leaves_images(model: Callable[[Tensor], object], x: Tensor) -> None:
    """Refuse a model that writes to its input, in whatever way, with gradients or without.

    Args:
        model: images to anything; it is called twice, on copies.
        x: a few images ``[B, ...]``.

    Raises:
        WritesToItsInput: it does.
    """
    for recorded in (False, True):
        images = x.detach().clone().requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            try:
                ask(model, images)
            except WritesToItsInput:
                raise
            except Exception:
                # a model without gradients can be evaluated too
                if not recorded:
                    raise
        if not torch.equal(images.detach(), x.detach()):
            raise WritesToItsInput


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two answers are more than rounding apart.

    What rounding may do grows with the numbers themselves, what matters with how far the logits of an image lie apart:
    neither is an absolute number, since logits times 1e-8 decide the same.

    Args:
        first: logits ``[B, classes]``.
        second: those of another call.
    """
    if first.shape != second.shape:
        return True
    a, b = first.double(), second.double()
    finite = a.isfinite() & b.isfinite()
    if not bool(((a == b) | (a.isnan() & b.isnan()) | finite).all()):
        return True
    apart = (a - b).where(finite, 0.0).abs().max()
    spread = (a.where(finite, -torch.inf).amax(1) - a.where(finite, torch.inf).amin(1)).max().clamp(min=0)
    size = a.where(finite, 0.0).abs().max()
    return bool(apart > SAME_SPREAD * spread + SAME_SIZE * size)
