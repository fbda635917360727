"""Makes a fast copy of a model for the gradients of attacks; the copy folds BatchNorms and computes in bfloat16.

No measured time decides whether a copy is used, and making a copy does not change the state of the random generators.
So the same model is attacked in the same way, also in a resumed evaluation.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._validation import GradientPrecision
from ..model_state import identity_key
from ..protocols import (
    Accelerates,
    Classifier,
    CountsImages,
    PassesOn,
    Purifies,
    SampleLogits,
    is_purifier,
    supports,
)
from ..speed.agreement import same_direction, same_logits
from ..speed.folding.batchnorm import fold_batchnorm
from ..speed.folding.inference_copy import InferenceCopy
from ..speed.graphs.step_graphs import remember
from ..speed.processor import fast_bfloat16
from ..speed.watch import FEWEST_WEIGHTS, matrix_weights
from .attacked_model import gradient_to

#: The number of images on which a copy is compared with its model.
COMPARED = 8
#: A copy is used only if its purified images differ from its model's purified images by at most this number, averaged
#: over the pixels, in image units.
PURIFIED_TOLERANCE = 0.03
#: The number of copies that are kept: an evaluation attacks several variants of one model, one after the other.
REMEMBERED = 2
#: The number of kept wrappers. A wrapper holds a copy. Wrappers are kept because a step that was captured as a CUDA
#: graph can be replayed only with the wrapper with which it was captured.
WRAPPERS = 8


class GradientCopies:
    """The copies of an evaluation's models; a copy is used again as long as its model has not changed.

    The values of all tensors are compared. PyTorch's count of writes misses writes through ``.data``, and also counts
    writes that change no value.
    """

    def __init__(self) -> None:
        #: Each value is a tuple: the copy of a model, or None; the model and its objects, which are stored so that
        #: Python cannot reuse their ids and addresses; and the values of its tensors at the time of the copy.
        self._copies: dict[Hashable, tuple[Classifier | None, tuple[Any, ...], list[Tensor]]] = {}
        self._around: dict[int, tuple[PassesOn, Classifier, Classifier]] = {}

    def same_around(self, wrapper: PassesOn, inner: Classifier, around: Classifier) -> Classifier:
        """Return ``around``, a wrapper of ``inner``, or an equal wrapper, with which CUDA graphs were captured."""
        known = self._around.get(id(wrapper))
        if known is None or known[0] is not wrapper or known[1] is not inner:
            known = remember(self._around, id(wrapper), (wrapper, inner, around), WRAPPERS)
        return known[2]

    def of(self, model: nn.Module, shape: torch.Size, make: Callable[[], Classifier | None]) -> Classifier | None:
        """Return the kept copy of a model for images of this shape, or that of ``make``, which may be None."""
        try:
            settings, objects, tensors = identity_key(model)
            key = (id(model), shape, settings)
            known = self._copies.get(key)
            same = known is not None and all(map(torch.equal, tensors, known[2]))
            values = [] if same else [tensor.detach().clone() for tensor in tensors]
        except (TypeError, RuntimeError):
            # The model has a tensor without storage, or a setting that cannot be hashed, so its copy cannot be kept.
            return make()
        if known is None or not same:
            known = make(), (model, objects, tensors), values
        return remember(self._copies, key, known, REMEMBERED)[0]


def gradient_copy(
    model: Classifier, x: Tensor, precision: GradientPrecision, copies: GradientCopies | None = None
) -> Classifier:
    """The model from which an attack takes its gradients: a fast copy of the attacked model, or this model itself."""
    if precision == "float32" or (precision == "auto" and not fast_bfloat16(x.device)):
        return model
    if isinstance(model, PassesOn) and supports(model, PassesOn):
        return _inside(model, x, precision, copies)
    if not isinstance(model, nn.Module):
        return model
    # A defence that makes many samples of an image is faster in bfloat16 even with few weights.
    small = not supports(model, Accelerates) and matrix_weights(model) < FEWEST_WEIGHTS
    if precision == "auto" and small:
        return model
    # A model may draw random numbers while it is copied. These draws must not change the random numbers of the attack.
    with _same_draws(x.device):
        duplicate = _made(model, x) if copies is None else copies.of(model, x.shape[1:], lambda: _made(model, x))
    # A kept copy is compared again for two reasons. Some changes of a user's model cannot be detected. And the choice
    # must not depend on when, and on which images, the copy was first compared.
    return duplicate if duplicate is not None and _fits(duplicate, model, x) else model


def _inside(wrapper: Any, x: Tensor, precision: GradientPrecision, copies: GradientCopies | None) -> Classifier:
    """A wrapper around a copy of the model inside ``wrapper``; ``wrapper`` itself if there is no copy."""
    copied: Classifier | None = None

    def replace(inner: Classifier) -> Classifier:
        nonlocal copied
        followed = gradient_copy(inner, x, precision, copies)
        copied = None if followed is inner else followed
        return followed

    around = wrapper.around(replace)
    if copied is None:
        return wrapper
    if copies is not None:
        around = copies.same_around(wrapper, copied, around)
    if not isinstance(wrapper, nn.Module) or supports(wrapper, CountsImages):
        # A wrapper that counts images does not change the logits, and a comparison would add images to its count.
        return around
    # So far only the model inside the wrapper was compared with its copy, but the attack calls the wrapper.
    with _same_draws(x.device):
        return around if _fits(around, wrapper, x) else wrapper


def _made(model: nn.Module, x: Tensor) -> Classifier | None:
    accelerates = supports(model, Accelerates)
    if isinstance(model, InferenceCopy) or (not accelerates and (supports(model, SampleLogits) or is_purifier(model))):
        return None
    try:
        if accelerates:
            duplicate = copy.deepcopy(model).accelerate(torch.bfloat16)  # type: ignore[operator]
            # The copy is never trained, so the BatchNorms of its purifier can be folded too.
            fold_batchnorm(duplicate)
            return cast(Classifier, duplicate)
        return InferenceCopy(model, tuple(x.shape[1:]), torch.bfloat16, fine=True).eval()
    except Exception:
        # A user's module may raise any error when it is copied, folded or run in bfloat16. Such a module has no copy.
        return None


def _same_draws(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context that restores the random generators at its end, so that two computations draw the same numbers."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _fits(duplicate: Classifier, model: Classifier, x: Tensor) -> bool:
    """Tell whether a copy computes the same as its model; both draw the same noise for the comparison."""
    try:
        with torch.no_grad():
            got, want = _run(duplicate, x), _run(model, x)
        return same_logits(got, want) and _same_direction(duplicate, model, x)
    except Exception:
        # An error of the copy must not end the attack. An error of the model itself will be raised by the attack.
        return False


def _same_direction(duplicate: Classifier, model: Classifier, x: Tensor) -> bool:
    """Tell whether a copy has the purified images and the input gradients of its model."""
    if isinstance(model, Purifies) and isinstance(duplicate, Purifies):
        with torch.no_grad():
            before, after = (_run(each.purify, x) for each in (model, duplicate))
        if not bool((before - after).abs().mean() <= PURIFIED_TOLERANCE):
            return False
    # Leave inference mode, because nothing can be differentiated in it.
    with torch.inference_mode(False), torch.enable_grad():
        got, want = (_input_gradient(each, x.detach().clone()) for each in (duplicate, model))
        return same_direction(got, want)


def _run(function: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    with _same_draws(x.device):
        return function(x).float()


def _input_gradient(model: Classifier, leaf: Tensor) -> Tensor:
    """The flat gradient of the largest minus the second largest logit, summed over the images; 0 without a gradient."""
    leaf.requires_grad_()
    first, second = _run(model, leaf).topk(2, 1).values.unbind(1)
    gradient = gradient_to(leaf, (first - second).sum())
    return torch.zeros_like(leaf).flatten() if gradient is None else gradient.flatten()
