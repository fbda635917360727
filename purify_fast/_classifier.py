"""The protocols of models that every attack reads. `purify_fast.protocols` has the others, and passes these on."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class Classifier(Protocol):
    """Maps images to logits."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]`` in [0, 1]."""


@runtime_checkable
class SharesDraws(Protocol):
    """Computes several independent predictions, distributed like those of ``forward``, together in less time."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """The logits of ``draws`` independent calls, ``[draws, B, classes]``."""


def supports(model: object, methods: type | str) -> bool:
    """Return True if the type of ``model`` has the method of this name, or the methods of a protocol."""
    own = type(model)
    return callable(getattr(own, methods, None)) if isinstance(methods, str) else issubclass(own, methods)
