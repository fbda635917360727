"""The copy of a model that gradients are taken from: BatchNorm folded, bfloat16 where the machine is fast at it.

Nothing is decided by a measurement of time: the same model on the same kind of machine is always attacked alike.
Nothing that is done here moves the random generators on either: an evaluation that goes on after an interruption finds
what it would have found, although it makes its copies at other moments.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...protocols import Accelerates, Classifier, PassesOn, SampleLogits, is_purifier, supports
from ...speed.accelerated import Accelerated
from ...speed.dependencies import dependencies
from ...speed.folding import fold_sequential
from ...speed.halving import replace_resizing
from ...speed.inference_copy import InferenceCopy
from ..arguments import Precision

#: Weights of convolutions and linear layers below which "auto" stays in float32: conversions cost more than they save.
FEWEST_WEIGHTS = 1_000_000
#: Images of a batch on which the copy is compared with the model.
COMPARED = 8
#: How far the copy's logits may be from the model's, relative to the largest, before the copy is given up.
TOLERANCE = 0.1
#: How many copies are kept: an evaluation attacks one model, in one variant after the other.
KEPT = 2


class GradientCopies:
    """The copies that were made already, such as those of an evaluation; each serves as long as its model is the same.

    A model is the same while all that `purify_fast.speed.dependencies` sees of it is, and no weight was written to.
    """

    def __init__(self) -> None:
        # with the model and the objects whose ids are in the key, so that no other object gets one of these ids
        self._kept: OrderedDict[Hashable, tuple[Any, Classifier | None]] = OrderedDict()

    def of(self, model: nn.Module, shape: torch.Size, make: Callable[[], Classifier | None]) -> Classifier | None:
        """The copy of a model; None where there is none.

        Args:
            model: what is copied.
            shape: of an image.
            make: makes a copy.
        """
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            # these do not count how often they are written to
            return make()
        try:
            values, objects = dependencies(model)
        except TypeError:
            return make()
        key = (id(model), shape, values, tuple(tensor._version for tensor in tensors))
        if key not in self._kept:
            self._kept[key] = ((model, objects), make())
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]


def gradient_copy(
    model: Classifier, x: Tensor, precision: Precision, copies: GradientCopies | None = None
) -> Classifier:
    """What an attack on a model takes its gradients from.

    Args:
        model: images to logits.
        x: a few of the images ``[B, C, H, W]``, on which the copy is compared with the model.
        precision: "float32": the model itself. "bfloat16": a copy that multiplies in bfloat16, if one can be made.
            "auto": such a copy where the device multiplies bfloat16 fast and the model is large enough to gain.
        copies: where copies are kept for the next attack, if given.

    Returns:
        The copy, or the model itself where there is none: for a plain function, for a model that cannot be copied or
        folded, and where the copy's logits are not the model's.
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
    module = model
    # a model may draw while it is copied or compared
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        made = _made(module, x) if copies is None else copies.of(module, x.shape[1:], lambda: _made(module, x))
        # a copy that was kept is compared too: not everything that a user's model computes with can be seen
        return model if made is None or not _alike(made, model, x) else made


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32.

    Args:
        device: a CPU or a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def matrix_weights(model: nn.Module) -> int:
    """How many weights the convolutions and linear layers of a model have.

    Args:
        model: any module.
    """
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, layers))


def _inside(wrapper: PassesOn, x: Tensor, precision: Precision, copies: GradientCopies | None) -> Classifier:
    """The same for what a wrapper holds; the wrapper itself where there is no copy of that."""
    copied = False

    def replace(inner: Classifier) -> Classifier:
        nonlocal copied
        made = gradient_copy(inner, x, precision, copies)
        copied = made is not inner
        return made

    around = wrapper.around(replace)
    return around if copied else cast(Classifier, wrapper)


def _made(model: nn.Module, x: Tensor) -> Classifier | None:
    if isinstance(model, InferenceCopy):
        return None
    try:
        if supports(model, Accelerates):
            return _for_gradients(copy.deepcopy(model).accelerate(torch.bfloat16), x.device)  # type: ignore[operator]
        if supports(model, SampleLogits) or is_purifier(model):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return InferenceCopy(model, tuple(x.shape[1:]), torch.bfloat16).eval()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
        # a user's module may refuse to be copied, folded or run in bfloat16
        return None


def _for_gradients(made: nn.Module, device: torch.device) -> Classifier:
    """An accelerated copy that will never be trained: the purifier's BatchNorms are folded too."""
    fold_sequential(made)
    if device.type == "cpu":
        fast = getattr(made, "fast", None)
        parts = [made]
        if isinstance(fast, Accelerated):
            parts += [fast.classifier, *([] if fast.reader is None else [fast.reader.model])]
        for part in parts:
            replace_resizing(part, torch.bfloat16)
    return cast(Classifier, made)


@torch.no_grad()
def _alike(made: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Whether a copy says what the model says; of a random model only that it says something."""
    try:
        want, got = model(x), made(x)
    except (RuntimeError, TypeError, AttributeError):
        return False
    if want.shape != got.shape or not bool(got.isfinite().all()):
        return False
    if supports(model, SampleLogits):
        return True
    return bool((got - want).abs().max() <= TOLERANCE * want.abs().max())
