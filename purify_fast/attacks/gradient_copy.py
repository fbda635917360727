"""The copy of a model that gives the gradients: BatchNorm is folded, and bfloat16 is used if the machine is fast at it.

No measured time decides anything: the same model on the same kind of machine is always attacked alike. And the random
generators stay as they were: an evaluation that continues after an interruption finds the same images, although it
makes its copies at other moments.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._validation import GradientPrecision
from ..defences.stochastic import StochasticDefence
from ..model_state import identity_key
from ..protocols import (
    Accelerates,
    Classifier,
    CountsImages,
    DeterministicMode,
    FixedNoise,
    PassesOn,
    Purifies,
    SampleLogits,
    is_purifier,
    supports,
)
from ..speed.folding.batchnorm import fold_sequential
from ..speed.folding.inference_copy import InferenceCopy
from ..speed.graphs.step_graphs import remember
from .attacked_model import gradient_to

#: Models with fewer weights in convolutions and linear layers than this stay in float32 with "auto", because
#: conversions to bfloat16 cost them more than they save.
FEWEST_WEIGHTS = 250_000
#: The number of images on which a copy is compared with its model.
COMPARED = 8
#: How far a difference between two logits of the copy may be from the model's, as a share of that difference; where the
#: difference is small, as a share of the median gap between the leading classes.
TOLERANCE = 0.1
#: The largest difference between the purified images of a copy and its model, averaged over the pixels, in image units.
PURIFIED_TOLERANCE = 0.03
#: The least cosine between the input gradients of a copy and its model; below it the copy is not used.
LEAST_COSINE = 0.8
#: The number of copies that are kept. An evaluation attacks one model, but in several variants one after the other.
REMEMBERED = 2
#: The number of wrappers around copies that are kept, so that a captured step finds the same object again.
WRAPPERS = 8


class GradientCopies:
    """The copies of an evaluation's models; each is used as long as its model is the same.

    A model is the same as long as its `purify_fast.model_state.identity_key` is equal and every tensor in that key has
    the same values. The values are kept for this comparison, which takes as much memory again as the model. PyTorch's
    count of writes would not do: it misses writes through ``.data``, and it changes when a value is written back, as
    ``fixed_noise`` does.
    """

    def __init__(self) -> None:
        #: By key: the copy of a model (None if it has none); the model and its objects, held so that their ids and
        #: addresses are not reused; and the values of its tensors when the copy was made.
        self._copies: dict[Hashable, tuple[Classifier | None, tuple[Any, ...], list[Tensor]]] = {}
        self._around: dict[int, tuple[PassesOn, Classifier, Classifier]] = {}

    def same_around(self, wrapper: PassesOn, inner: Classifier, around: Classifier) -> Classifier:
        """The object for a wrapper around a copy: ``around`` at first, and the same object while wrapper and copy stay.

        The object has to be the same, because a captured step belongs to one object.
        """
        known = self._around.get(id(wrapper))
        if known is None or known[0] is not wrapper or known[1] is not inner:
            known = remember(self._around, id(wrapper), (wrapper, inner, around), WRAPPERS)
        return known[2]

    def of(self, model: nn.Module, shape: torch.Size, make: Callable[[], Classifier | None]) -> Classifier | None:
        """The copy of a model for images of a shape, made if it is not known yet; None if there is no copy."""
        try:
            settings, objects, tensors = identity_key(model)
            key = (id(model), shape, settings)
            known = self._copies.get(key)
            same = known is not None and all(map(torch.equal, tensors, known[2]))
            values = [] if same else [tensor.detach().clone() for tensor in tensors]
        except (TypeError, RuntimeError):
            # The model has a tensor without memory of its own, or a setting that cannot be hashed, so its copy cannot
            # be kept.
            return make()
        if known is None or not same:
            known = make(), (model, objects, tensors), values
        return remember(self._copies, key, known, REMEMBERED)[0]


def gradient_copy(
    model: Classifier, x: Tensor, precision: GradientPrecision, copies: GradientCopies | None = None
) -> Classifier:
    """The model from which an attack takes its gradients.

    Args:
        model: images to logits.
        x: a few of the images ``[B, C, H, W]``, on which the copy is compared with the model.
        precision: "float32": the model itself. "bfloat16": a copy that multiplies in bfloat16, if one can be made.
            "auto": such a copy where the device multiplies bfloat16 fast and the model is large enough to gain.
        copies: where copies are kept for the next attack, if given.

    Returns:
        The copy. It is the model itself for a plain function, for a model that cannot be copied or folded, and for a
        model whose logits, purified images or input gradients the copy does not reproduce. Both draw the same noise
        while they are compared.
    """
    if precision == "float32" or (precision == "auto" and not fast_bfloat16(x.device)):
        return model
    if isinstance(model, PassesOn) and supports(model, PassesOn):
        return _inside(model, x, precision, copies)
    if not isinstance(model, nn.Module):
        return model
    # A defence that makes many samples of an image gains from bfloat16 even with few weights.
    small = not supports(model, Accelerates) and matrix_weights(model) < FEWEST_WEIGHTS
    if precision == "auto" and small:
        return model
    # A model may draw random numbers while it is copied; the attack's numbers must not depend on that.
    with _same_draws(x.device):
        duplicate = _made(model, x) if copies is None else copies.of(model, x.shape[1:], lambda: _made(model, x))
    # A kept copy is compared again for two reasons. Some of the data that a user's model computes with cannot be seen.
    # And the choice for these images must not depend on when the copy was made, or on which images.
    return duplicate if duplicate is not None and _fits(duplicate, model, x) else model


def fast_bfloat16(device: torch.device) -> bool:
    """Tell whether a device, a CPU or a GPU, multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def matrix_weights(model: nn.Module) -> int:
    """The number of weights in the convolutions and linear layers of a model."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, layers))


def _inside(wrapper: PassesOn, x: Tensor, precision: GradientPrecision, copies: GradientCopies | None) -> Classifier:
    """The wrapper around a copy of the model inside it; the wrapper itself if there is no copy."""
    copied: Classifier | None = None

    def replace(inner: Classifier) -> Classifier:
        nonlocal copied
        followed = gradient_copy(inner, x, precision, copies)
        copied = None if followed is inner else followed
        return followed

    around = wrapper.around(replace)
    if copied is None:
        return cast(Classifier, wrapper)
    if copies is not None:
        around = copies.same_around(wrapper, copied, around)
    if not isinstance(wrapper, nn.Module) or supports(wrapper, CountsImages):
        # A wrapper that counts images does not change the logits, and would count the images of a comparison.
        return around
    # The model inside was compared without its wrapper, but the attack calls it through the wrapper.
    with _same_draws(x.device):
        return around if _fits(around, wrapper, x) else wrapper


def _made(model: nn.Module, x: Tensor) -> Classifier | None:
    if isinstance(model, InferenceCopy):
        return None
    try:
        if supports(model, Accelerates):
            duplicate = copy.deepcopy(model).accelerate(torch.bfloat16)  # type: ignore[operator]
            # The copy is never trained, so the BatchNorms of its purifier can be folded too.
            fold_sequential(duplicate)
            return cast(Classifier, duplicate)
        if supports(model, SampleLogits) or is_purifier(model):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return InferenceCopy(model, tuple(x.shape[1:]), torch.bfloat16, fine=True).eval()
    except Exception:
        # A user's module may raise any error when it is copied, folded or run in bfloat16. It then has no copy.
        return None


def _same_draws(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Puts the generators back where they were: what is run twice, each time within one, draws the same."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _without_noise(model: object) -> contextlib.AbstractContextManager[Any]:
    """A mode of a model in which it repeats itself, whatever it draws from."""
    # A StochasticDefence draws its seeds from PyTorch's generators, so it needs no mode. A mode would also refuse calls
    # of the defence from other threads.
    if not isinstance(model, StochasticDefence):
        if supports(model, FixedNoise):
            return cast(FixedNoise, model).fixed_noise(0)
        if supports(model, DeterministicMode):
            return cast(DeterministicMode, model).deterministic()
    return contextlib.nullcontext()


def _fits(duplicate: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Tell whether a copy computes what its model computes; both draw the same noise for the comparison."""
    try:
        return _same_logits(duplicate, model, x) and _same_direction(duplicate, model, x)
    except Exception:
        # An error of a copy must not end the attack. An error of the model itself is raised by the attack.
        return False


@torch.no_grad()
def _same_logits(duplicate: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Tell whether a copy's logits are the model's.

    A number that is added to all logits of an image changes neither the decision nor the softmax. The logits are
    therefore compared by how far each class is behind the class that the model decides for.
    """
    want, got = (_run(each, x, each) for each in (model, duplicate))
    # Measure the gap from the first to the 4th class, the last that targeted DLR reads. With few classes measure to an
    # earlier one, because the smallest logit may be far from the others.
    leading = want.topk(min(4, 2 + (want.shape[1] - 1) // 4), 1).values
    if want.shape != got.shape or not bool(got.isfinite().all()):
        return False
    top = want.argmax(1, keepdim=True)
    behind, its_own = (logits.gather(1, top) - logits for logits in (want, got))
    # Each class has its own limit. With one limit for all, a class that is far behind would allow the others any error.
    allowed = TOLERANCE * behind.clamp_min((leading[:, 0] - leading[:, -1]).median())
    return bool(((its_own - behind).abs() <= allowed).all())


def _same_direction(duplicate: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Tell whether a copy's purified images and gradients to the input are the model's."""
    if isinstance(model, Purifies) and isinstance(duplicate, Purifies):
        with torch.no_grad():
            before, after = (_run(each, x, each.purify) for each in (model, duplicate))
        if not bool((before - after).abs().mean() <= PURIFIED_TOLERANCE):
            return False
    # Leave inference mode, because nothing can be differentiated in it.
    with torch.inference_mode(False), torch.enable_grad():
        try:
            want = _input_gradient(model, x.detach().clone())
        except Exception:
            # The model has no gradient, for example because its weights were made in inference mode. The copy may still
            # have one: the model judges the points to which it leads.
            return True
        size = want.norm()
        if not (bool(size.isfinite()) and bool(size > 0)):
            return True
        got = _input_gradient(duplicate, x.detach().clone())
    return bool(torch.dot(want, got) >= LEAST_COSINE * size * got.norm())


def _run(model: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    with _same_draws(x.device), _without_noise(model):
        return function(x).float()


def _input_gradient(model: Classifier, leaf: Tensor) -> Tensor:
    """The gradient of the largest logit's lead over the second, summed over the images; flat, 0 if there is none."""
    leaf.requires_grad_()
    first, second = _run(model, leaf, model).topk(2, 1).values.unbind(1)
    gradient = gradient_to(leaf, (first - second).sum())
    return torch.zeros_like(leaf).flatten() if gradient is None else gradient.flatten()
