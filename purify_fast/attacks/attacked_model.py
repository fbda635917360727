"""The model under attack: it is frozen, its calls are checked for writes to the images, and its draws are tested.

A model that writes to the images that it is given would change the points of an attack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .._tensors import repeat_batch
from ..model_state import hidden_modules
from ..protocols import Classifier, CountsImages, SharesDraws, draws_for_each_image, supports

Answer = TypeVar("Answer")

#: The sizes of the test whether a model draws once per call. TRIED_IMAGES: its images. TRIED_ROWS: the rows of one
#: batch with several draws of these images. TRIED_CALLS: the calls with each image once. If a model picks one of two
#: networks in each call, all of these calls agree by chance once in 128 times.
TRIED_IMAGES, TRIED_ROWS, TRIED_CALLS = 2, 8, 8
#: Draws of one call count as equal if they differ by less than this share of the difference between two calls.
ALIKE = 0.01

#: Two answers of a model count as equal if no logit differs by more than SAME_SPREAD times the spread of an image's
#: logits plus SAME_SIZE times the largest logit.
SAME_SPREAD = 1e-5
#: About 16 times the rounding of float32.
SAME_SIZE = 2e-6


@contextlib.contextmanager
def frozen(model: Classifier) -> Iterator[None]:
    """Within the block, ``model`` is in evaluation mode and no parameter asks for a gradient.

    A compiled backward computes weight gradients for every parameter that asks for a gradient, needed or not: about a
    third of an attack's work. Modules that the model holds in a plain list, in an object or in a hook are frozen as its
    registered modules are (`purify_fast.model_state.hidden_modules`).

    Args:
        model: an ``nn.Module``; any other callable is left as it is. A caller that attacks a module's method must
            freeze the module itself.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    wholes = [model, *(module for _, module in hidden_modules(model))]
    modes = [(module, module.training) for whole in wholes for module in whole.modules()]
    trainable = [p for whole in wholes for p in whole.parameters() if p.requires_grad]
    try:
        for whole in wholes:
            whole.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


class WritesToItsInput(ValueError):
    """A model changed the images that it was given."""

    def __init__(self) -> None:
        super().__init__(
            "the model writes to the images that it is given, on which the attack continues: copy them in the model "
            "by x = x.clone() before its first operation in place (x.mul_(), x.clamp_(), x += ..., x[...] = ...)"
        )


def ask(model: Callable[[Tensor], Answer], x: Tensor) -> Answer:
    """Call a model on images, and refuse a model that writes to them; the check takes no time.

    PyTorch counts the writes to a tensor, except those through ``x.data`` or a NumPy array of the same memory. A model
    that writes to the images has changed them: give a copy if that must not happen.

    Raises:
        WritesToItsInput: the model wrote to the images, or tried to while gradients to them were recorded.
    """
    # A compiler cannot trace the count of writes, and inference tensors have no such count.
    if torch.compiler.is_compiling() or x.is_inference():
        return model(x)
    writes = x._version
    try:
        answer = model(x)
    except RuntimeError as error:
        # The parameters are frozen, so the images are the only leaf that can require a gradient.
        if "leaf Variable that requires grad is being used in an in-place operation" in str(error):
            raise WritesToItsInput from error
        raise
    if x._version != writes:
        raise WritesToItsInput
    return answer


def gradient_to(leaf: Tensor, value: Tensor) -> Tensor | None:
    """The gradient of a number to images, or None.

    It is None if the number does not depend on the images, or if PyTorch has no derivative for a function on the way,
    such as ``x // 1``.
    """
    if not value.requires_grad:
        return None
    # A compiler cannot trace the `try` block below.
    if torch.compiler.is_compiling():
        return torch.autograd.grad(value, leaf, allow_unused=True)[0]
    try:
        return torch.autograd.grad(value, leaf, allow_unused=True)[0]
    except RuntimeError as error:
        if "derivative for" in str(error) and "is not implemented" in str(error):
            return None
        raise


def check_leaves_images(model: Callable[[Tensor], object], x: Tensor) -> None:
    """Refuse a model that writes to its input in any way; it is called on copies, with gradients and without.

    Raises:
        WritesToItsInput: the model wrote to its input.
    """
    for recorded in (False, True):
        images = x.detach().clone().requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            try:
                ask(model, images)
            except WritesToItsInput:
                raise
            except Exception:
                # A model that fails only while gradients are recorded can still be evaluated, so its error is ignored
                # here.
                if not recorded:
                    raise
        if not torch.equal(images.detach(), x.detach()):
            raise WritesToItsInput


def differ(first: Tensor, second: Tensor) -> bool:
    """Tell whether two answers, logits ``[B, classes]``, differ by more than rounding.

    Rounding grows with the logits, and a difference matters in relation to the spread of an image's logits. So neither
    limit is an absolute number: logits times 1e-8 decide the same.
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


def logits_of_draws(model: Classifier, x: Tensor, draws: int) -> Tensor:
    """Logits ``[draws * B, classes]`` of several draws of each image; the first draw of every image comes first.

    A model that shares work between its draws makes all of them at once.
    """
    if draws > 1 and supports(model, SharesDraws):
        shares = cast(SharesDraws, model)
        return ask(lambda images: shares.draw_logits(images, draws), x).flatten(0, 1)
    return ask(model, repeat_batch(x, draws) if draws > 1 else x)


@torch.no_grad()
def drawn_once_per_call(model: Classifier, x: Tensor, draws: int, most: int | None = None) -> bool:
    """Tell whether a random model draws once for all images of a call, as a model that picks a network in every call.

    It does if several draws of an image, taken as an attack takes them, are equal, while another call gives other
    draws. The random generators are restored afterwards. The comparison waits for the device.

    Args:
        model: images to logits; within `frozen`.
        x: images ``[B, ...]``; the first few are tested.
        draws: the number of draws that an attack will take. With one draw the model is not called. Nor is it called if
            its class promises draws for each image (`purify_fast.protocols.draws_for_each_image`), because a training
            would test it in every step.
        most: the most images in one forward pass; None: no limit.
    """
    rows = min(TRIED_ROWS, len(x) * draws, TRIED_ROWS if most is None else most)
    if draws == 1 or rows < 2 or draws_for_each_image(model):
        return False
    some = x[: min(TRIED_IMAGES, rows // 2)].detach().clone()
    times = rows // len(some)
    counted = cast(CountsImages, model).counted() if supports(model, CountsImages) else 0
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        together = logits_of_draws(model, some, times)
        first = ask(model, some)
        others = (ask(model, some) for _ in range(TRIED_CALLS - 1))
        other = next((other for other in others if differ(first, other)), first)
    if supports(model, CountsImages):
        # The counter is for the images of attacks, so the images of this test are subtracted.
        cast(CountsImages, model).count(counted - cast(CountsImages, model).counted())

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).double().nan_to_num(nan=0.0).abs().max())

    # The position of an image in a batch may change the last bits of its logits, and in bfloat16 even the second digit.
    # So equal draws need only be close.
    return apart(together, repeat_batch(together[: len(some)], times)) < ALIKE * apart(first, other)
