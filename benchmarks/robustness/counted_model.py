"""Count the work that an attack requires of a model: images in forward passes, and images in gradient computations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Counts:
    """The counted work. A deep copy of this object is the object itself, so copies of a counted model share it.

    Attributes:
        forwards: number of images in all forward passes.
        gradients: number of images in all gradient computations.
    """

    def __init__(self) -> None:
        self.forwards = self.gradients = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counts:
        return self

    def count_gradient(self, gradient: Tensor) -> None:
        """Count the images of a computed gradient."""
        self.gradients += len(gradient)


class CountedModel(nn.Module):
    """Counts the images of a model's forward passes and gradients, also of gradients in a copy of the model.

    Args:
        model: classifier, images ``[B, C, H, W]`` to logits ``[B, classes]``.
    """

    #: The counts change no predictions (`purify_fast.model_state`).
    not_dependencies = frozenset({"counts"})

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.counts = model, Counts()
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        self.counts.forwards += len(x)
        if x.requires_grad:
            # A hook on the attack's own tensor would remain there, and would count the gradients of later passes too.
            x = x.view_as(x)
            x.register_hook(self.counts.count_gradient)
        return self.model(x)
