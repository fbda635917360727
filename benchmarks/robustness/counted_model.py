"""Counts of an attack's work at the model: images of forward passes, and gradients to images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Counts:
    """The sums, which copies of a counted model share.

    Attributes:
        forwards: number of images that went through the model, counted each time.
        gradients: number of images to which a gradient was computed, counted each time.
    """

    def __init__(self) -> None:
        self.forwards = self.gradients = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counts:
        return self

    def count_gradient(self, gradient: Tensor) -> None:
        """Count the images of a gradient that arrives at them."""
        self.gradients += len(gradient)


class CountedModel(nn.Module):
    """A model that counts its inputs.

    An attack that computes gradients in a copy of the model copies the counter too, so that nothing is missed.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``.
    """

    #: The counts do not change predictions, so fingerprints and captured steps ignore them (`purify_fast.model_state`).
    not_dependencies = frozenset({"counts"})

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.counts = model, Counts()
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        self.counts.forwards += len(x)
        if x.requires_grad:
            # Put the hook on a new tensor of this pass. On the attack's own tensor it would remain, and count later
            # passes again.
            x = x.view_as(x)
            x.register_hook(self.counts.count_gradient)
        return self.model(x)
