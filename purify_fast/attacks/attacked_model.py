"""The model under attack: it is frozen and tested, and a model that writes to its input is refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._tensors import repeat_batch
from ..model_state import hidden_modules
from ..protocols import Classifier, CountsImages, Passes, SharesDraws, draws_for_each_image, supports
from ..speed.agreement import differ
from .arguments import check_labels
from .outputs import INSTEAD_OF_PROBABILITIES, are_probabilities, checked_logits

Answer = TypeVar("Answer")

#: `drawn_once_per_call` tests a model on TRIED_IMAGES images. A call has a batch of at most TRIED_ROWS rows, which
#: contains each image several times. At least TRIED_CALLS calls make at least FEWEST_DRAWS draws. A model that picks
#: one of two networks in each call picks the same network in TRIED_CALLS calls with the probability 1/128.
TRIED_IMAGES, TRIED_ROWS, TRIED_CALLS, FEWEST_DRAWS = 2, 8, 8, 64
#: Draws of a call are taken as equal if they differ by less than this share of the difference between two calls.
ALIKE = 0.01


@contextlib.contextmanager
def frozen(model: Classifier, *, keep_mode: bool = False) -> Iterator[None]:
    """A context in which ``model`` is in evaluation mode, and its parameters have ``requires_grad=False``.

    At the end, modes and flags are restored. Modules in a plain list, in an object or in a hook of the model are frozen
    too. Frozen parameters save time, because a compiled backward pass would compute their gradients.

    Args:
        model: an ``nn.Module``; any other callable is not changed. If an attack runs on a method of a module, the
            caller must freeze the module.
        keep_mode: whether the modes are left as they are.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    from ..speed.frozen_weights import images_only, restored

    wholes = [model, *(module for _, module in hidden_modules(model))]

    def evaluate() -> None:
        # A BatchNorm in training mode would give other numbers, and nothing would tell of it.
        for whole in wholes if not keep_mode else ():
            whole.eval()

    parts = {module: None for whole in wholes for module in whole.modules()}
    with restored("training", parts, evaluate), images_only(*wholes):
        yield


class WritesToItsInput(ValueError):
    """A model has changed its input in place."""

    def __init__(self) -> None:
        super().__init__(
            "model must not write to its input x, because the attack still needs x: call x = x.clone() in the model "
            "before its first in-place operation (x.mul_(), x.clamp_(), x += ..., x[...] = ...)"
        )


def call_checked(model: Callable[[Tensor], Answer], x: Tensor) -> Answer:
    """Call a model on images, and refuse a model that writes to them. Writes through ``x.data`` are not seen."""
    # torch.compile cannot trace the count of writes, and inference tensors have no such count.
    if torch.compiler.is_compiling() or x.is_inference():
        return model(x)
    writes = x._version
    try:
        answer = model(x)
    except RuntimeError as error:
        # PyTorch itself refuses a write to images whose gradient is recorded.
        if x.requires_grad and "a leaf Variable that requires grad" in str(error):
            raise WritesToItsInput from error
        raise
    if x._version != writes:
        raise WritesToItsInput
    return answer


#: During a direct call of an attack, until the model has returned its first logits: the name and values of the labels.
_first_output: ContextVar[tuple[str, Tensor] | None] = ContextVar("first_output", default=None)


def logits_of(model: Classifier, x: Tensor) -> Tensor:
    """The logits of images, ``[B, classes]``; a model that writes to them (`call_checked`) is refused."""
    return _at_first(checked_logits(call_checked(model, x), len(x)))


def _at_first(logits: Tensor) -> Tensor:
    """Check and return logits. If they are the first of a direct call, compare the labels with the classes."""
    if not torch.compiler.is_compiling() and (labels := _first_output.get()) is not None:
        _first_output.set(None)
        if logits.device.type == "cpu" and logits.numel() and not is_in_torch_dispatch_mode():
            if bool(logits.isnan().any()):
                warnings.warn("the model returns NaN for some images: an attack cannot move them", stacklevel=2)
            if are_probabilities(logits):
                warnings.warn(f"the model returns probabilities, not logits: {INSTEAD_OF_PROBABILITIES}", stacklevel=2)
        check_labels(*labels, logits.shape[1])
    return logits


@contextlib.contextmanager
def called_directly(name: str, labels: Tensor) -> Iterator[None]:
    """The context of an attack without an evaluation.

    On a CPU it warns of NaN or probabilities as logits, and refuses ``labels``, an argument called ``name``, that no
    class has. The labels of a loss of the user's own are free, so ``labels`` is then empty.
    """
    token = _first_output.set((name, labels))
    try:
        yield
    finally:
        _first_output.reset(token)


def gradient_to(leaf: Tensor, value: Tensor) -> Tensor | None:
    """The gradient of ``value`` with respect to ``leaf``; None if there is no dependence or no derivative."""
    if not value.requires_grad:
        return None
    # torch.compile cannot trace the `try` block below.
    if torch.compiler.is_compiling():
        return torch.autograd.grad(value, leaf, allow_unused=True)[0]
    try:
        return torch.autograd.grad(value, leaf, allow_unused=True)[0]
    except RuntimeError as error:
        if "derivative for" in str(error) and "is not implemented" in str(error):
            return None
        raise


def logits_of_draws(model: Classifier, x: Tensor, draws: int) -> Tensor:
    """Logits ``[draws * B, classes]`` of several draws of each image; the first draws of all images come first."""
    if draws > 1 and supports(model, SharesDraws):
        shares = cast(SharesDraws, model)
        return _at_first(call_checked(lambda images: shares.draw_logits(images, draws), x).flatten(0, 1))
    return logits_of(model, repeat_batch(x, draws) if draws > 1 else x)


@torch.no_grad()
def drawn_once_per_call(model: Classifier, x: Tensor, draws: int, most: int | None = None) -> bool:
    """Return True if a random model draws once for all images of a call, like a model that picks one of two networks.

    The result is True if in every call all draws of an image are equal, but two calls differ.
    """
    rows = min(TRIED_ROWS, len(x) * draws, TRIED_ROWS if most is None else most)
    if draws == 1 or rows < 2 or draws_for_each_image(model):
        return False
    some = x[: min(TRIED_IMAGES, rows // 2)].detach().clone()
    times = rows // len(some)
    calls = max(TRIED_CALLS, FEWEST_DRAWS // rows)
    counted = cast(CountsImages, model).counted() if supports(model, CountsImages) else Passes()

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).double().nan_to_num(nan=0.0).abs().max())

    # The largest difference between two calls, and the largest difference between the copies of an image in a call.
    between = within = 0.0
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        first: Tensor | None = None
        for _ in range(calls):
            logits = logits_of_draws(model, some, times)
            within = max(within, apart(logits, repeat_batch(logits[: len(some)], times)))
            first = logits if first is None else first
            if differ(first, logits):
                between = max(between, apart(first, logits))
            # An image's position in a batch may change the last bits of its logits, in bfloat16 even the second digit.
            if between > 0 and within >= ALIKE * between:
                break
    if supports(model, CountsImages):
        # The counter should count only the images of attacks, so the images of this test are subtracted.
        cast(CountsImages, model).count(counted - cast(CountsImages, model).counted())
    return within < ALIKE * between
