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

#: Weights of convolutions and linear layers below which "auto" stays in float32: conversions cost more than they save.
FEWEST_WEIGHTS = 250_000
#: Images of a batch on which the copy is compared with the model.
COMPARED = 8
#: The largest error of the copy's differences between logits, relative to the difference itself, or if that is small
#: relative to the usual difference of the top classes.
TOLERANCE = 0.1
#: The largest mean error of the purified images over the pixels, in image units.
PURIFIED_TOLERANCE = 0.03
#: The least cosine between the input gradients of a copy and of its model.
LEAST_COSINE = 0.8
#: The number of copies that are kept; an evaluation attacks one model, in one variant after the other.
REMEMBERED = 2
#: The number of wrappers around copies that are kept.
WRAPPERS = 8


class GradientCopies:
    """The copies of an evaluation's models; each serves as long as its model is the same.

    A model is the same while its `purify_fast.model_state.identity_key` is, and every tensor among that has the same
    values. The values themselves are remembered for this, as much memory again as the model takes: a tensor that was
    written to through ``.data`` does not count that, and one that was written back, as by ``fixed_noise``, is the same.
    """

    def __init__(self) -> None:
        #: The copy of a model, or None where there is none; the identities of the model at that time, which keep its
        #: ids and memory addresses from being given to other objects; and what its tensors contained.
        self._copies: dict[Hashable, tuple[Classifier | None, tuple[Any, ...], list[Tensor]]] = {}
        self._around: dict[int, tuple[PassesOn, Classifier, Classifier]] = {}

    def same_around(self, wrapper: PassesOn, inner: Classifier, around: Classifier) -> Classifier:
        """The object for a wrapper around a copy: ``around`` at first, and the same object while wrapper and copy stay.

        It has to be the same, because a captured step belongs to one object.
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
            # a tensor without a memory of its own, or a setting that cannot be hashed
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
        The copy, or the model itself where there is none: for a plain function, for a model that cannot be copied or
        folded, and where the differences between the copy's logits are not the model's, or not its purified images
        or input gradients. Both draw the same noise while they are compared.
    """
    if precision == "float32" or (precision == "auto" and not fast_bfloat16(x.device)):
        return model
    if isinstance(model, PassesOn) and supports(model, PassesOn):
        return _inside(model, x, precision, copies)
    if not isinstance(model, nn.Module):
        return model
    # a defence that makes many samples of an image is large in another way
    small = not supports(model, Accelerates) and matrix_weights(model) < FEWEST_WEIGHTS
    if precision == "auto" and small:
        return model
    # a model may draw while it is copied
    with _same_draws(x.device):
        duplicate = _made(model, x) if copies is None else copies.of(model, x.shape[1:], lambda: _made(model, x))
    # A copy that was remembered is compared too: not everything that a user's model computes with can be seen. And what
    # is decided for these images must not depend on when the copy was made, or with which images.
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
        # a counter changes nothing, and would count what is compared
        return around
    # the model inside was compared by itself, but the attack sees it through the wrapper
    with _same_draws(x.device):
        return around if _fits(around, wrapper, x) else wrapper


def _made(model: nn.Module, x: Tensor) -> Classifier | None:
    if isinstance(model, InferenceCopy):
        return None
    try:
        if supports(model, Accelerates):
            duplicate = copy.deepcopy(model).accelerate(torch.bfloat16)  # type: ignore[operator]
            # it will never be trained: the purifier's BatchNorms are folded too
            fold_sequential(duplicate)
            return cast(Classifier, duplicate)
        if supports(model, SampleLogits) or is_purifier(model):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return InferenceCopy(model, tuple(x.shape[1:]), torch.bfloat16, fine=True).eval()
    except Exception:
        # a user's module may refuse to be copied, folded or run in bfloat16
        return None


def _same_draws(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Puts the generators back where they were: what is run twice, each time within one, draws the same."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _without_noise(model: object) -> contextlib.AbstractContextManager[Any]:
    """A mode of a model in which it repeats itself, whatever it draws from."""
    # A StochasticDefence draws its seeds from PyTorch's generators, so that no mode is needed; and entering one is
    # refused while other threads call the defence.
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
        # A copy never ends an attack, whatever it raises. An error of the model itself is raised by the attack.
        return False


@torch.no_grad()
def _same_logits(duplicate: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Tell whether a copy's logits are the model's.

    A number that is added to all logits of an image changes neither the decision nor the softmax. The logits are
    therefore compared by how far each class is behind the class that the model decides for.
    """
    want, got = (_run(each, x, each) for each in (model, duplicate))
    # Compare down to the 4th class, which targeted DLR reads; with few classes not as far, because the last logit may
    # be far off.
    leading = want.topk(min(4, 2 + (want.shape[1] - 1) // 4), 1).values
    if want.shape != got.shape or not bool(got.isfinite().all()):
        return False
    top = want.argmax(1, keepdim=True)
    behind, its_own = (logits.gather(1, top) - logits for logits in (want, got))
    # Each class has a limit of its own: a class far behind would allow the others any error.
    allowed = TOLERANCE * behind.clamp_min((leading[:, 0] - leading[:, -1]).median())
    return bool(((its_own - behind).abs() <= allowed).all())


def _same_direction(duplicate: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Tell whether a copy's purified images and gradients to the input are the model's."""
    if isinstance(model, Purifies) and isinstance(duplicate, Purifies):
        with torch.no_grad():
            before, after = (_run(each, x, each.purify) for each in (model, duplicate))
        if not bool((before - after).abs().mean() <= PURIFIED_TOLERANCE):
            return False
    # outside of inference mode, in which nothing is differentiated
    with torch.inference_mode(False), torch.enable_grad():
        try:
            want = _input_gradient(model, x.detach().clone())
        except Exception:
            # Weights that were made in inference mode have no gradient. The copy may have a gradient; the model judges
            # the points that it leads to.
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
