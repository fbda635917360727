"""Checks the output of a model, and explains the errors of a model that does not accept some images.

A model maps images ``[B, C, H, W]`` to logits ``[B, classes]``, for every batch size B. Its output may also be an
object or a mapping with such ``logits``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._memory import ran_out_of_memory
from .._tensors import dtype_of
from ..model_state import switch_to_evaluation, used_modules
from ..protocols import Classifier

#: Phrases in PyTorch's error messages about wrong shapes of images.
SHAPE_ERRORS = ("Given groups=", "mat1 and mat2", "Given normalized_shape", "Given input size", "is invalid for input")
#: PyTorch's ValueError for a BatchNorm in training mode that gets a single image.
ONE_VALUE = "Expected more than 1 value per channel"
#: The largest number of members of a tuple that an error message describes.
MEMBERS = 4
#: The largest batch size that is tried in order to explain an error.
LARGEST_TRIED = 256
#: Advice for a model that returns probabilities instead of logits.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which predicts the same "
    "classes"
)
#: The problem and the advice for a model that returns one-hot vectors, in the words of errors and reports.
ONE_HOT = (
    "returns one-hot rows (each has a single 1, and otherwise zeros). They name a class and have no gradient: return "
    "the logits [B, classes] from which the class is chosen"
)
#: Advice for a model that drops the dimension of the batch.
SQUEEZED = "does it squeeze the batch? Use flatten(1), or give squeeze the dimension"


class LogitsOf(nn.Module):
    """A wrapper that returns only the logits of a model, and that may convert the images for the model.

    Args:
        model: the model; any callable. Its output is logits, or an object or mapping with ``logits``.
        dtype: the dtype to which the images are converted; the logits are then at least float32. None: images and
            logits are not converted.
    """

    def __init__(self, model: Classifier, dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.dtype = model, dtype
        switch_to_evaluation(self)

    @property
    def fingerprinted(self) -> Classifier:
        """The model whose weights `purify_fast.model_state.fingerprint` reads."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype is None:
            return logits_in(self.model(x))
        logits = logits_in(self.model(x.to(self.dtype)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


# -- the output ---------------------------------------------------------------------------------------------------


def logits_in(output: Any) -> Tensor:
    """The output itself if it is a tensor, or else the tensor ``logits`` in an object or a mapping.

    Raises:
        TypeError: there is no such tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return a torch.Tensor of logits [B, classes], or an object or mapping that holds such a "
            f"tensor under the name logits, got {_described(output)}{_instead_of(output)}"
        )
    return logits


def checked_logits(output: Any, images: int) -> Tensor:
    """The logits in a model's output, ``[B, classes]``; only types and shapes are checked, which takes no time.

    Args:
        output: the output.
        images: the number of images B.

    Raises:
        TypeError: the output is neither a tensor nor an object or mapping with a tensor ``logits``.
        ValueError: the logits do not have the shape ``[B, classes]`` with at least two classes, or are not floating
            point.
    """
    logits = logits_in(output)
    good = logits.dim() == 2 and logits.shape[0] == images and logits.shape[1] > 1 and logits.is_floating_point()
    if not good:
        raise ValueError(_fault(logits, images))
    return logits


def _fault(logits: Tensor, images: int) -> str:
    """The message about logits that `checked_logits` refuses."""
    shape = list(logits.shape)
    got = f"{shape} for {_images(images)}"
    if logits.dim() < 2 and shape != [images]:
        return f"the model must return logits [B, classes], got {got}: {SQUEEZED}"
    if logits.dim() == 2 and shape[0] != images and shape[1] == images:
        return f"the model must return logits [B, classes], got {got}: are they transposed? Return logits.T"
    if _seem_classes(logits):
        return (
            f"the model returns one whole number for each image, {logits.dtype} {shape}, such as "
            f"{logits.flatten()[0]:g}: this looks like the class. Attacks need the logits [B, classes]: return the "
            "logits without argmax, max or topk"
        )
    if shape in ([images], [images, 1]):
        return (
            f"the model returns a single number for each image, {shape}: attacks need logits [B, classes] of at least "
            "two classes. If the number is the logit of the second of two classes, give lambda x: "
            f"torch.{'stack' if logits.dim() == 1 else 'cat'}([-model(x), model(x)], 1) / 2, which has the same "
            "probabilities"
        )
    if logits.dim() != 2 or shape[0] != images:
        mixed = ": does it mix or drop images of a batch?" if logits.dim() == 2 else ""
        return f"the model must return logits [B, classes], got {got}{mixed}"
    what = f"{logits.dtype} {shape}"
    if are_one_hot(logits):
        return f"the model {ONE_HOT}. The logits must be floating point, got {what}"
    return (
        f"the model must return logits in floating point, got {what}: if a larger number means a more likely class, "
        "return output.float()"
    )


def _seem_classes(output: Tensor) -> bool:
    """Tell whether the output seems to be predicted classes: for each image, one whole number that is at least 0."""
    if output.dim() != 1 and not (output.dim() == 2 and output.shape[1] == 1):
        return False
    return not output.is_complex() and bool(((output >= 0) & (output == output.round())).all())


def are_one_hot(logits: Tensor) -> bool:
    """Tell whether every row is a single 1 among zeros.

    Args:
        logits: output of a model, ``[B, classes]``.
    """
    return bool((((logits == 0) | (logits == 1)).all(1) & (logits.sum(1) == 1)).all())


def are_probabilities(logits: Tensor) -> bool:
    """Tell whether every row of the output consists of probabilities: numbers in [0, 1] whose sum is 1.

    Args:
        logits: output of a model, ``[B, classes]``.
    """
    # The tolerance is for rounding: the sum has many rounded terms, and half precision has only three or four digits.
    room = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    inside = (values >= 0) & (values <= 1 + room)
    return bool(inside.all() and ((values.sum(1) - 1).abs() <= room).all())


def _described(output: Any) -> str:
    """Describe a model's output by its type, and by dtype and shape if it has them; a tuple or list by its members."""
    if isinstance(output, (tuple, list)):
        members = [_described(member) for member in output[:MEMBERS]]
        more = [f"{len(output) - MEMBERS} more"] if len(output) > MEMBERS else []
        return f"a {type(output).__name__} of {', '.join([*members, *more]) or 'nothing'}"
    kind = f"{type(output).__module__}.{type(output).__name__}".removeprefix("builtins.")
    shape = getattr(output, "shape", None)
    return kind if shape is None else f"{kind} {getattr(output, 'dtype', '')} {list(shape)}"


def _instead_of(output: Any) -> str:
    """Return the end of an error message: a function to evaluate instead of the model, or nothing if none is known."""
    if isinstance(output, (tuple, list)):
        places = [place for place, one in enumerate(output) if isinstance(one, Tensor) and one.dim() == 2]
        return f". If the logits are member {places[0]}, give lambda x: model(x)[{places[0]}]" if places else ""
    if isinstance(output, np.ndarray):
        return (
            ". torch.from_numpy(output) makes a tensor, but attacks then have no gradient: compute the logits in "
            "PyTorch if possible"
        )
    return ""


# -- the errors of a model -------------------------------------------------------------------------------------------


@torch.no_grad()
def reason_of(error: Exception, model: Classifier, x: Tensor) -> ValueError | None:
    """The reason why a model has failed on images or on a part of them, and the remedy, as an error.

    Args:
        error: the model's own error.
        model: any callable; a module is in evaluation mode.
        x: the images ``[B, ...]``.

    Returns:
        The error; None if the reason is not known.
    """
    if ran_out_of_memory(error):
        return None
    said = f"(error: {(str(error) or type(error).__name__).splitlines()[0]})"
    dtype, size = dtype_of_weights(model), len(x)
    if dtype != x.dtype and runs_on(model, x.to(dtype)):
        narrow = torch.finfo(dtype).bits < torch.finfo(x.dtype).bits
        cure = f"give lambda x: model(x.to({dtype})).float() as the model" if narrow else f"give x.to({dtype})"
        return ValueError(f"the model's weights are {dtype}, but the images are {x.dtype}: {cure} {said}")
    if runs_on(model, x):
        runs, fails = size, None if runs_on(model, x[:1]) else 1
    else:
        # A number in the message may be a batch size that the model contains.
        sizes = [1, 2, *(n for n in map(int, re.findall(r"\d+", str(error))) if 0 < n <= LARGEST_TRIED)]
        runs = next((n for n in dict.fromkeys(sizes) if n != size and runs_on(model, resized(x, n))), 0)
        fails = size if runs else None
    if fails is None:
        return None if runs or x.dim() != 4 else _wrong_shape(error, model, x, said)
    cure = f"if forward contains a batch size, as in x.reshape({max(runs, 2)}, -1), write x.flatten(1)"
    if fails == 1:
        cure += "; if it squeezes the batch, give squeeze the dimension"
    if ONE_VALUE in str(error):
        cure = "call eval() on the modules that the model uses, because a BatchNorm is in training mode"
    if "Guard failed" in str(error):
        cure = 'export it with a dynamic batch size, such as dynamic_shapes=({0: torch.export.Dim("b", min=1)},)'
    return ValueError(
        f"the model must accept every batch size, because the batches of an attack shrink. It runs on {_images(runs)}, "
        f"but fails on {_images(fails)} {said}: {cure}"
    )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _wrong_shape(error: Exception, model: Classifier, x: Tensor, said: str) -> ValueError | None:
    """The error about images of a shape that the model does not accept; None if the shape is not the reason."""
    # A last dimension of 1, 3 or 4 usually means images [N, H, W, C]. Else explain only PyTorch's errors about shapes.
    if x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return ValueError(
            f"x must be [N, C, H, W], got [N, {', '.join(map(str, x.shape[1:]))}], and the model fails on it {said}: "
            "the channels seem to be last; x.permute(0, 3, 1, 2) puts them first"
        )
    if not isinstance(error, RuntimeError) or not any(text in str(error) for text in SHAPE_ERRORS):
        return None
    given = list(x.shape[1:])
    wanted = _wanted(model, given)
    return ValueError(f"x has images [C, H, W] = {given}, which the model does not accept{wanted} {said}")


def dtype_of_weights(model: Classifier) -> torch.dtype:
    """The dtype of a module's first weights, or of the first module that a function uses; float32 without weights."""
    whole = model if isinstance(model, nn.Module) else next((module for _, module in used_modules(model)), None)
    return torch.float32 if whole is None else dtype_of(whole)


def resized(x: Tensor, size: int) -> Tensor:
    """The first ``size`` images; if there are fewer, they are repeated."""
    return x if size == len(x) else x[torch.arange(size, device=x.device) % len(x)]


def runs_on(model: Classifier, x: Tensor) -> bool:
    """Tell whether a model accepts images ``[B, ...]``."""
    try:
        model(x)
    except Exception:
        return False
    return True


def image_shape_of(model: Any, given: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the images for which a model of this package was made; None for other models.

    Args:
        model: any callable.
        given: the shape of the present images, (C, H, W). It gives the height and width if the model accepts any size.
    """
    shape = getattr(model, "image_shape", None)
    if isinstance(shape, tuple):
        return shape
    facts = getattr(model, "arguments", None)
    if not isinstance(facts, Mapping) or "in_channels" not in facts:
        return None
    return (facts["in_channels"], *facts.get("image_size", given[1:]))


def _wanted(model: Any, given: Sequence[int]) -> str:
    """Return the end of an error message: the images that the model accepts, or nothing if they are unknown."""
    shape = image_shape_of(model, given)
    if shape is not None and shape != tuple(given):
        return f": it was trained on {list(shape)}"
    layers = model.modules() if isinstance(model, nn.Module) else ()
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    if first is None or first.in_channels == given[0]:
        return ""
    return f": its first convolution takes {first.in_channels} channels"
