"""What an evaluation is given, as it needs it: images in [0, 1] with their labels, and a model that returns logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..protocols import Classifier

#: What is to be done about a model that returns probabilities.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which decides the same"
)


def in_chunks(x: Tensor | Iterable[Any], y: Tensor | None, least: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Images and labels as `evaluate` needs them, a part after the other.

    Args:
        x: images, uint8 or float32 in [0, 1], ``[N, C, H, W]``, which are one part; or, without ``y``, a DataLoader or
            any other iterable of batches (images, labels) or (images, labels, indices), which is read once. The indices
            are not used.
        y: labels, int64 ``[N]``.
        least: images of each part of an iterable; more where a batch of it reaches beyond, and fewer in the last part.

    Yields:
        Images, float32 in [0, 1], labels, int64, and whether there are more.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: something else than tensors, or than batches of them.
    """
    if y is not None:
        yield *collect(x, y), False
        return
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, batch_labels in _read(x):
        if sum(map(len, images)) >= least:
            part = collect(torch.cat(images), torch.cat(labels))
            # the batches are not held while the part is attacked
            images, labels = [], []
            yield *part, True
        images.append(batch)
        labels.append(batch_labels)
    if not images:
        raise ValueError("the iterable has no batch: a generator can be read only once")
    yield *collect(torch.cat(images), torch.cat(labels)), False


def collect(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Images and labels as `evaluate` needs them.

    Args:
        x: images, uint8 or float32 in [0, 1], ``[N, C, H, W]``.
        y: labels, int64 ``[N]``.

    Returns:
        Images, float32 in [0, 1], and labels, int64.

    Raises:
        ValueError: a wrong shape, dtype or range, or no images.
        TypeError: something else than tensors.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            raise TypeError(f"{name} must be a torch.Tensor, got {kind}{_as_tensor(name, value)}")
    if x.dim() != 4 or len(x) == 0:
        hint = ": x[:, None] makes grey images [N, 1, H, W]" if x.dim() == 3 and x.shape[0] not in (1, 3) else ""
        hint = ": x[None] makes one image [1, C, H, W]" if x.dim() == 3 and x.shape[0] in (1, 3) else hint
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}{hint}")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 [N] = [{len(x)}], got {y.dtype} {list(y.shape)}{_as_labels(x, y)}")
    # tensors made in inference mode take part in no gradient
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y
    if x.dtype != torch.float32:
        hint = "x.float() makes them float32" if x.is_floating_point() else "x.byte() makes them uint8, if in 0..255"
        raise ValueError(f"x must be uint8 or float32, got {x.dtype}: {hint}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x must be in [0, 1] and free of NaN, got {_range(x)}")
    return x.clone() if x.is_inference() else x.detach(), y


def _as_tensor(name: str, value: Any) -> str:
    """The line that makes a tensor of what was given; empty where none does."""
    if isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor):
        return f": torch.stack({name}) makes one of them"
    return f": torch.as_tensor({name}) makes one of it" if isinstance(value, (np.ndarray, list, tuple)) else ""


def _as_labels(x: Tensor, y: Tensor) -> str:
    """The line that makes labels of what was given; empty where none does."""
    if y.shape == (len(x),):
        return "" if y.is_floating_point() else "; y.long() makes them int64"
    if y.dim() == 2 and len(y) == len(x):
        many = "y.argmax(1) makes labels of one-hot rows" if y.shape[1] > 1 else "y[:, 0].long() takes its only column"
        return f"; {many}"
    return ""


def _range(x: Tensor) -> str:
    """What values images have that are not in [0, 1], and the line that mends it where one can be told."""
    if bool(x.isnan().any()):
        return f"{int(x.isnan().sum())} values that are NaN"
    least, most = float(x.min()), float(x.max())
    advice = ""
    if 1.5 < most <= 255 and least >= 0:
        advice = "; x is in 0..255: divide by 255, or give uint8"
    elif -1 <= least < 0 and most <= 1:
        advice = (
            "; x is in [-1, 1]: give (x + 1) / 2 as the images, and lambda x: model(2 * x - 1) as the model, so that "
            "eps is a share of the range from black to white"
        )
    elif least < 0:
        advice = (
            "; normalized images are wanted as they were before: give x * std + mean, and let the model normalize "
            "them: lambda x: model((x - mean) / std)"
        )
    return f"values from {least:.3g} to {most:.3g}{advice}"


def _read(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an iterable; they may not differ in dtype or in the size of their images."""
    if isinstance(batches, (Tensor, np.ndarray)) or not isinstance(batches, Iterable):
        raise TypeError(f"without y, x must be an iterable of batches (images, labels), got {type(batches).__name__}")
    first: tuple[torch.dtype, list[int]] | None = None
    for i, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(f"batch {i} must be (images, labels) or (images, labels, indices), got {got}")
        x, y = batch[:2]
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            got = f"{type(x).__name__} and {type(y).__name__}"
            hint = _as_tensor("images", x) or _as_tensor("labels", y)
            raise TypeError(f"batch {i} must have tensors as images and labels, got {got}{hint}")
        kind = x.dtype, list(x.shape[1:])
        first = first or kind
        if x.dim() != 4 or y.shape != (len(x),) or kind != first:
            raise ValueError(
                f"batch {i} must have images [B, C, H, W], of the dtype and size of the first {first}, and labels [B], "
                f"got {x.dtype} {list(x.shape)} and {list(y.shape)}"
            )
        yield x, y


class LogitsOf(nn.Module):
    """A model that returns an object or a mapping with ``logits``, as its logits alone.

    Args:
        model: the model; any callable.
    """

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return _logits_in(self.model(x))


def as_classifier(model: Any) -> Classifier:
    """A model as the evaluation asks it: a callable that returns logits.

    Args:
        model: any callable; what it returns is looked at when it is asked for the first time.

    Raises:
        TypeError: no callable, or a class in place of an object of it.
    """
    if isinstance(model, type):
        raise TypeError(f"the model is the class {model.__name__}: give an object of it, such as {model.__name__}()")
    if not callable(model):
        raise TypeError(f"the model must be callable, images to logits, got {type(model).__name__}")
    return model


@torch.no_grad()
def returning_logits(model: Classifier, some: Tensor) -> tuple[Classifier, int]:
    """The model, or where it returns an object or a mapping with logits the model as these alone; and its classes.

    Args:
        model: any callable.
        some: a few images ``[B, C, H, W]``.

    Raises:
        TypeError: no tensor is returned, and nothing that has one as ``logits``.
        ValueError: another shape than ``[B, classes]`` with two classes at least, or the model fails on images whose
            channels come last.
    """
    output = _first_output(model, some)
    if isinstance(output, Tensor):
        logits = output
    else:
        model, logits = LogitsOf(model), _logits_in(output)
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        raise ValueError(
            f"the model returns a single number for each image, {list(logits.shape)}: an evaluation needs logits "
            "[B, classes] of two classes at least. For one logit z of the second class give "
            "lambda x: torch.cat([-model(x), model(x)], 1) / 2, whose softmax is sigmoid(z)"
        )
    if logits.dim() != 2 or len(logits) != len(some):
        raise ValueError(f"the model must return logits [B, classes], got {list(logits.shape)} for {len(some)} images")
    return model, logits.shape[1]


def _first_output(model: Classifier, some: Tensor) -> Any:
    """What the model returns for a few images."""
    try:
        return model(some)
    except Exception as error:
        # a size that only images [N, H, W, C] usually have
        if some.shape[3] not in (1, 3, 4) or some.shape[1] in (1, 3, 4):
            raise
        raise ValueError(
            f"x must be [N, C, H, W], got [N, {', '.join(map(str, some.shape[1:]))}], and the model fails on it "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): the channels seem to come last; "
            "x.permute(0, 3, 1, 2) puts them first"
        ) from error


def are_probabilities(logits: Tensor) -> bool:
    """Whether every line is one of probabilities: numbers in [0, 1] whose sum is 1.

    Args:
        logits: what a model returned, ``[B, classes]``.
    """
    # a sum of many rounded numbers; half precision rounds to three or four digits
    room = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    inside = (values >= 0) & (values <= 1 + room)
    return bool(inside.all() and ((values.sum(1) - 1).abs() <= room).all())


def _logits_in(output: Any) -> Tensor:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor of logits, or an object or mapping with them as logits, got "
            f"{type(output).__name__}"
        )
    return logits
