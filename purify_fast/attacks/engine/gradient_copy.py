"""The copy of a model that gradients are taken from: BatchNorm folded, bfloat16 where the machine is fast at it.

Nothing is decided by a measurement of time: the same model on the same kind of machine is always attacked alike.
"""

from __future__ import annotations

import copy
import warnings
from typing import cast

import torch
from torch import Tensor, nn

from ...protocols import Accelerates, Classifier, PassesOn, SampleLogits, is_purifier, supports
from ...speed.inference_copy import InferenceCopy
from ..arguments import Precision

#: Weights of convolutions and linear layers below which "auto" stays in float32: conversions cost more than they save.
FEWEST_WEIGHTS = 1_000_000
#: Images of a batch on which the copy is compared with the model.
COMPARED = 8
#: How far the copy's logits may be from the model's, relative to the largest, before the copy is given up.
TOLERANCE = 0.1


def gradient_copy(model: Classifier, x: Tensor, precision: Precision) -> Classifier:
    """What an attack on a model takes its gradients from.

    Args:
        model: images to logits.
        x: a few of the images ``[B, C, H, W]``, on which the copy is compared with the model.
        precision: "float32": the model itself. "bfloat16": a copy that multiplies in bfloat16, if one can be made.
            "auto": such a copy where the device multiplies bfloat16 fast and the model is large enough to gain.

    Returns:
        The copy, or the model itself where there is none: for a plain function, for a model that cannot be copied or
        folded, and where the copy's logits are not the model's.
    """
    if precision == "float32" or (precision == "auto" and not fast_bfloat16(x.device)):
        return model
    if isinstance(model, PassesOn) and supports(model, PassesOn):
        return _inside(model, x, precision)
    if not isinstance(model, nn.Module):
        return model
    # a defence that makes many samples of an image is large in another way
    small = not supports(model, Accelerates) and matrix_weights(model) < FEWEST_WEIGHTS
    if precision == "auto" and small:
        return model
    made = _made(model, x)
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


def _inside(wrapper: PassesOn, x: Tensor, precision: Precision) -> Classifier:
    """The same for what a wrapper holds; the wrapper itself where there is no copy of that."""
    copied = False

    def replace(inner: Classifier) -> Classifier:
        nonlocal copied
        made = gradient_copy(inner, x, precision)
        copied = made is not inner
        return made

    around = wrapper.around(replace)
    return around if copied else cast(Classifier, wrapper)


def _made(model: nn.Module, x: Tensor) -> Classifier | None:
    if isinstance(model, InferenceCopy):
        return None
    try:
        if supports(model, Accelerates):
            return copy.deepcopy(model).accelerate(torch.bfloat16)  # type: ignore[operator]
        if supports(model, SampleLogits) or is_purifier(model):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return InferenceCopy(model, tuple(x.shape[1:]), torch.bfloat16).eval()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
        # a user's module may refuse to be copied, folded or run in bfloat16
        return None


@torch.no_grad()
def _alike(made: Classifier, model: nn.Module, x: Tensor) -> bool:
    """Whether a copy says what the model says; of a random model only that it says something."""
    try:
        want, got = model(x), made(x)
    except RuntimeError:
        return False
    if want.shape != got.shape or not bool(got.isfinite().all()):
        return False
    if supports(model, SampleLogits):
        return True
    return bool((got - want).abs().max() <= TOLERANCE * want.abs().max())
