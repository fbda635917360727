"""Checks and converts the inputs of an evaluation: images, labels, and the model's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..defences.base import Defence
from ..protocols import Classifier

#: The allowed dtypes of labels.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Phrases in PyTorch's error messages about wrong shapes of images.
SHAPE_ERRORS = ("Given groups=", "mat1 and mat2", "Given normalized_shape", "Given input size", "is invalid for input")
#: The largest number of members of a tuple that an error message describes.
MEMBERS = 4
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


def images_and_labels(x: Tensor | Iterable[Any], y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check images and labels, and convert them.

    Args:
        x: images in a form that `collect` accepts. Or, without ``y``, a DataLoader or another iterable of batches
            (images, labels) or (images, labels, indices). The indices are not used.
        y: labels, integers ``[N]``.

    Returns:
        Images, float32 in [0, 1], and labels, int64.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: x or y is not a tensor or array, or x without y does not yield batches of tensors or arrays.
    """
    if y is not None:
        return collect(x, y)
    batches = list(_read(x))
    if not batches:
        raise ValueError(
            "x must yield at least one batch, got none: a generator can be read only once, so make a new generator"
        )
    images, labels = zip(*batches, strict=True)
    return collect(torch.cat(images), torch.cat(labels))


def collect(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Check and convert images and labels.

    Args:
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array.
        y: labels, integers ``[N]``, a tensor or a NumPy array.

    Returns:
        Images, float32 in [0, 1], and labels, int64.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: x or y is not a tensor or array.
    """
    x, y = _of_array(x), _of_array(y)
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            raise TypeError(f"{name} must be a torch.Tensor or a NumPy array, got {kind}{_as_tensor(name, value)}")
    if x.dim() != 4 or len(x) == 0:
        hint = ": x[:, None] makes grey images [N, 1, H, W]" if x.dim() == 3 and x.shape[0] not in (1, 3) else ""
        hint = ": x[None] makes one image [1, C, H, W]" if x.dim() == 3 and x.shape[0] in (1, 3) else hint
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}{hint}")
    if y.shape != (len(x),) or y.dtype not in INTEGERS:
        raise ValueError(f"y must be integer labels [N] = [{len(x)}], got {y.dtype} {list(y.shape)}{_as_labels(x, y)}")
    # Tensors made in inference mode cannot take part in gradients.
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y.to(torch.int64)
    if not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating point, got {x.dtype}: if x is in 0..255, give x.byte()")
    x = x.float()
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x must be in [0, 1] and free of NaN, got {_range(x)}")
    return x.clone() if x.is_inference() else x.detach(), y.to(torch.int64)


def _of_array(value: Any) -> Any:
    """Convert a NumPy array of numbers to a tensor; return anything else unchanged."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        return value
    # The array is copied if necessary: PyTorch refuses negative strides and a byte order other than the machine's, and
    # warns about read-only arrays.
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))


def _as_tensor(name: str, value: Any) -> str:
    """Return the end of an error message: code that converts the input to a tensor, or nothing if none is known."""
    if isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor):
        return f": torch.stack({name}) makes a tensor of the list"
    return f": torch.as_tensor({name}) makes a tensor of the list" if isinstance(value, (list, tuple)) else ""


def _as_labels(x: Tensor, y: Tensor) -> str:
    """Return the end of an error message: code that converts the input to labels, or nothing if none is known."""
    if y.shape == (len(x),):
        whole = not y.is_floating_point() or bool((y == y.round()).all())
        return "; y.long() makes them int64" if whole else ""
    if y.dim() == 2 and len(y) == len(x):
        many = "y.argmax(1) makes labels of one-hot rows" if y.shape[1] > 1 else "y[:, 0].long() takes its only column"
        return f"; {many}"
    return ""


def _range(x: Tensor) -> str:
    """Describe the values of images that are outside [0, 1], with advice if the likely cause is known."""
    if bool(x.isnan().any()):
        return f"{int(x.isnan().sum())} values that are NaN"
    least, most = float(x.min()), float(x.max())
    advice = ""
    if 1.5 < most <= 255 and least >= 0:
        advice = "; x is in 0..255: divide by 255, or give uint8"
    elif -1 <= least < 0 and most <= 1:
        advice = (
            "; x is in [-1, 1]: give (x + 1) / 2 as the images, and lambda x: model(2 * x - 1) as the model. eps is "
            "then a radius on images in [0, 1]"
        )
    elif least < 0:
        advice = (
            "; if the images are normalized, give x * std + mean as the images, and lambda x: model((x - mean) / std) "
            "as the model"
        )
    return f"values from {least:.3g} to {most:.3g}{advice}"


def _read(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Read and check the batches of an iterable; all batches must have the same dtype and size of images."""
    if isinstance(batches, (Tensor, np.ndarray)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"without y, x must be an iterable of batches (images, labels), got {type(batches).__name__}: give y too, "
            "or give a DataLoader as x"
        )
    first: tuple[torch.dtype, list[int]] | None = None
    for i, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(f"batch {i} must be (images, labels) or (images, labels, indices), got {got}")
        x, y = map(_of_array, batch[:2])
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            got = f"{type(x).__name__} and {type(y).__name__}"
            hint = _as_tensor("images", x) or _as_tensor("labels", y)
            raise TypeError(f"batch {i} must have tensors or arrays as images and labels, got {got}{hint}")
        kind = x.dtype, list(x.shape[1:])
        first = first or kind
        if x.dim() != 4 or y.shape != (len(x),) or kind != first:
            raise ValueError(
                f"batch {i} must have images [B, C, H, W] with the dtype and the [C, H, W] of the first batch, "
                f"{first[0]} {first[1]}, and labels [B], got images {x.dtype} {list(x.shape)} and labels "
                f"{list(y.shape)}"
            )
        yield x, y


class LogitsOf(nn.Module):
    """A wrapper that returns only the ``logits`` of a model's output object or mapping.

    Args:
        model: the model; any callable.
    """

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()

    @property
    def fingerprinted(self) -> Classifier:
        """The model whose weights `purify_fast.model_state.fingerprint` reads."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        return _logits_in(self.model(x))


def as_classifier(model: Any) -> Classifier:
    """Return the model itself, after a check that it is callable.

    Args:
        model: any callable.

    Raises:
        TypeError: model is not callable, or is a class instead of an object.
    """
    if isinstance(model, type):
        raise TypeError(f"the model must be an object, got the class {model.__name__}: give {model.__name__}(...)")
    if not callable(model):
        raise TypeError(f"the model must be a callable from images to logits, got {type(model).__name__}")
    return model


@torch.no_grad()
def returning_logits(model: Classifier, some: Tensor) -> tuple[Classifier, int]:
    """Check a model's output, and return a model that returns only logits, and its number of classes.

    A model whose output is an object or a mapping with ``logits`` is wrapped; any other model is returned unchanged.

    Args:
        model: any callable.
        some: a few images ``[B, C, H, W]``.

    Raises:
        TypeError: the output is neither a tensor nor an object or mapping with a tensor ``logits``.
        ValueError: the model returns classes instead of logits, its logits do not have the shape ``[B, classes]`` with
            at least two classes, or it does not accept images of this shape.
    """
    output = _first_output(model, some)
    if isinstance(output, Tensor):
        logits = output
    else:
        model, logits = LogitsOf(model), _logits_in(output)
    if _seem_classes(logits):
        raise ValueError(
            f"the model returns one whole number for each image, {logits.dtype} {list(logits.shape)}, such as "
            f"{logits.flatten()[0]:g}: this looks like the class. An evaluation needs the logits [B, classes]: return "
            "the logits without argmax, max or topk"
        )
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        raise ValueError(
            f"the model returns a single number for each image, {list(logits.shape)}: an evaluation needs logits "
            "[B, classes] of at least two classes. If the number is the logit of the second of two classes, give "
            f"lambda x: torch.{'stack' if logits.dim() == 1 else 'cat'}([-model(x), model(x)], 1) / 2, which has the "
            "same probabilities"
        )
    if logits.dim() != 2 or len(logits) != len(some):
        raise ValueError(f"the model must return logits [B, classes], got {list(logits.shape)} for {len(some)} images")
    if not logits.is_floating_point():
        what = f"{logits.dtype} {list(logits.shape)}"
        if are_one_hot(logits):
            raise ValueError(f"the model {ONE_HOT}. The logits must be floating point, got {what}")
        raise ValueError(
            f"the model must return logits in floating point, got {what}: if a larger number means a "
            "more likely class, return output.float()"
        )
    return model, logits.shape[1]


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


def image_shape_of(model: Any, given: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the images for which a model of this package was made; None for other models.

    Args:
        model: any callable.
        given: the shape of the present images, (C, H, W). It gives the height and width if the model accepts any size.
    """
    if isinstance(model, Defence):
        return model.image_shape
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


def _first_output(model: Classifier, some: Tensor) -> Any:
    """Return the model's output for a few images, and explain an error about their shape."""
    try:
        return model(some)
    except Exception as error:
        # A last dimension of 1, 3 or 4 usually means images [N, H, W, C]. For other shapes, explain only PyTorch's
        # errors about shapes.
        if some.shape[3] not in (1, 3, 4) or some.shape[1] in (1, 3, 4):
            if not isinstance(error, RuntimeError) or not any(text in str(error) for text in SHAPE_ERRORS):
                raise
            given = list(some.shape[1:])
            raise ValueError(
                f"x has images [C, H, W] = {given}, which the model does not accept{_wanted(model, given)} "
                f"(PyTorch says: {str(error).splitlines()[0]})"
            ) from error
        raise ValueError(
            f"x must be [N, C, H, W], got [N, {', '.join(map(str, some.shape[1:]))}], and the model fails on it "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): the channels seem to be last; "
            "x.permute(0, 3, 1, 2) puts them first"
        ) from error


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


def _logits_in(output: Any) -> Tensor:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return a torch.Tensor of logits [B, classes], or an object or mapping that holds such a "
            f"tensor under the name logits, got {_described(output)}{_instead_of(output)}"
        )
    return logits


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
