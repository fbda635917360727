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
#: Advice for a model that returns probabilities instead of logits.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which predicts the same "
    "classes"
)

#: The problem and the advice for a model that returns one-hot vectors, in the words of errors and reports.
ONE_HOT = (
    "returns one-hot rows, a single 1 among zeros. They name a class and have no gradient: return the logits [B, "
    "classes] from which the class is chosen"
)


def in_chunks(x: Tensor | Iterable[Any], y: Tensor | None, least: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Check images and labels, and convert them part by part.

    Args:
        x: images in a form that `collect` accepts, which are one part; or, without ``y``, a DataLoader or another
            iterable of batches (images, labels) or (images, labels, indices). The iterable is read once, and the
            indices are not used.
        y: labels, integers ``[N]``.
        least: the smallest number of images in each part of an iterable; only the last part may have fewer.

    Yields:
        Images, float32 in [0, 1]; labels, int64; and whether another part follows.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: x or y is not a tensor or array, or x without y does not yield batches of tensors or arrays.
    """
    if y is not None:
        yield *collect(x, y), False
        return
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, batch_labels in _read(x):
        if sum(map(len, images)) >= least:
            part = collect(torch.cat(images), torch.cat(labels))
            # Free the memory of the batches before the part is attacked.
            images, labels = [], []
            yield *part, True
        images.append(batch)
        labels.append(batch_labels)
    if not images:
        raise ValueError(
            "x must yield at least one batch, got none: a generator can be read only once, so make a new one"
        )
    yield *collect(torch.cat(images), torch.cat(labels)), False


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
    x, y = _as_tensor("x", x), _as_tensor("y", y)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}")
    if y.shape != (len(x),) or y.dtype not in INTEGERS:
        raise ValueError(f"y must be integer labels [N] = [{len(x)}], got {y.dtype} {list(y.shape)}")
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


def _as_tensor(name: str, value: Any, place: str = "") -> Tensor:
    """Return a tensor unchanged, and a NumPy array of numbers as a tensor; TypeError for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        # The array is copied if necessary: PyTorch does not accept other byte orders and negative strides, and warns
        # about read-only arrays.
        return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    hint = ""
    if isinstance(value, (list, tuple)):
        function = "stack" if len(value) > 0 and isinstance(value[0], Tensor) else "as_tensor"
        hint = f": torch.{function}({name}) makes a tensor of the list"
    raise TypeError(f"{place}{name} must be a torch.Tensor or a NumPy array, got {_kind(value)}{hint}")


def _kind(value: Any) -> str:
    """The class of a value in words; a builtin class without its module."""
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _range(x: Tensor) -> str:
    """Describe the values of images that are outside [0, 1], and what to do if that is known."""
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
            "; if the images are normalized, give the images before the normalization, x * std + mean, and as the "
            "model lambda x: model((x - mean) / std), which normalizes them"
        )
    return f"values from {least:.3g} to {most:.3g}{advice}"


def _read(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Read and check the batches of an iterable; all batches must have the same dtype and size of images."""
    if isinstance(batches, (Tensor, np.ndarray)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"without y, x must be an iterable of batches (images, labels), got {type(batches).__name__}: give y too, "
            "or give a DataLoader as x"
        )
    first = None
    for i, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(f"batch {i} must be (images, labels) or (images, labels, indices), got {got}")
        x, y = (_as_tensor(*named, f"batch {i}: ") for named in zip(("images", "labels"), batch, strict=False))
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
        ValueError: the model returns a single number instead of logits, its logits do not have the shape ``[B,
            classes]`` with at least two classes, or it does not accept images of this shape.
    """
    output = _first_output(model, some)
    if isinstance(output, Tensor):
        logits = output
    else:
        model, logits = LogitsOf(model), _logits_in(output)
    if logits.dim() == 1 or logits.shape[1:] == (1,):
        raise ValueError(
            f"the model returns a single number for each image, {logits.dtype} {list(logits.shape)}, such as "
            f"{logits.flatten()[0].item()}: an evaluation needs logits [B, classes] of two classes at least. If the "
            "number is the class, return the logits without argmax, max or topk. For one logit z of the second class "
            "give lambda x: torch.cat([-model(x), model(x)], 1) / 2, whose softmax is sigmoid(z)"
        )
    if logits.dim() != 2 or len(logits) != len(some):
        raise ValueError(f"the model must return logits [B, classes], got {list(logits.shape)} for {len(some)} images")
    if not logits.is_floating_point():
        what = f"{logits.dtype} {list(logits.shape)}"
        if are_one_hot(logits):
            raise ValueError(f"the model {ONE_HOT}. The logits must be floating point, got {what}")
        raise ValueError(
            f"the model must return logits in floating point, got {what}: if they are scores, larger for a more likely "
            "class, return output.float()"
        )
    return model, logits.shape[1]


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


def _first_output(model: Classifier, some: Tensor) -> Any:
    """Return the model's output for a few images, and explain an error about their shape."""
    try:
        return model(some)
    except Exception as error:
        given = list(some.shape[1:])
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # A last dimension of 1, 3 or 4 usually means images [N, H, W, C]. For other shapes, explain only PyTorch's
        # errors about shapes.
        if given[2] in (1, 3, 4) and given[0] not in (1, 3, 4):
            raise ValueError(
                f"x must be [N, C, H, W], got [N, {', '.join(map(str, given))}], and the model fails on it ({reason}): "
                "the channels seem to be last; x.permute(0, 3, 1, 2) puts them first"
            ) from error
        if isinstance(error, RuntimeError) and any(text in str(error) for text in SHAPE_ERRORS):
            shape = image_shape_of(model, given)
            wanted = "" if shape is None or shape == tuple(given) else f": it was trained on {list(shape)}"
            raise ValueError(
                f"x has images [C, H, W] = {given}, which the model does not accept{wanted} (PyTorch says: {reason})"
            ) from error
        raise


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
            f"tensor under the name logits, got {_described(output)}"
        )
    return logits


def _described(output: Any) -> str:
    """Describe a model's output by its type, and by dtype and shape if it has them; a tuple or list by its members."""
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {', '.join(map(_described, output)) or 'nothing'}"
    shape = getattr(output, "shape", None)
    return _kind(output) if shape is None else f"{_kind(output)} {getattr(output, 'dtype', '')} {list(shape)}"
