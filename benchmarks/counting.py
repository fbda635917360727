"""Counts what an attack asks of a model, at the model's door: images of forward passes, and gradients to images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Counts:
    """The sums; copies of a counted model add to the same ones.

    Attributes:
        forwards: images that went through the model, each time they did.
        gradients: images to which a gradient was computed, each time it was.
    """

    def __init__(self) -> None:
        self.forwards = self.gradients = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counts:
        return self

    def count_gradient(self, gradient: Tensor) -> None:
        """Count the images of a gradient that arrives at them."""
        self.gradients += len(gradient)


class CountedModel(nn.Module):
    """A model with a counter at its door.

    An attack that computes its gradients in a copy of the model copies the door too, so that nothing is missed.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``.
    """

    #: What is counted changes no prediction (`purify_fast.contents`).
    not_dependencies = frozenset({"counts"})

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.counts = model, Counts()
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        self.counts.forwards += len(x)
        if x.requires_grad:
            # a tensor of this pass: a hook on the attack's own would stay there, and count every other pass again
            x = x.view_as(x)
            x.register_hook(self.counts.count_gradient)
        return self.model(x)
