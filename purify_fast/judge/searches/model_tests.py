"""Tests of a model before it is judged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...attacks.attacked_model import WritesToItsInput, logits_of
from ...attacks.outputs import checked_logits
from ...protocols import Classifier
from ...speed.agreement import differ

#: The number of images on which a model is tested before it is attacked.
SAMPLE = 8


@torch.no_grad()
def check_model(model: Classifier, some: Tensor) -> int:
    """Check a model's outputs on several images and on a single image, and return its number of classes."""
    classes = checked_logits(model(some), len(some)).shape[1]
    check_classes(checked_logits(model(some[:1]), 1), classes)
    return classes


def check_classes(logits: Tensor, classes: int) -> Tensor:
    """Return logits ``[B, classes]``; ValueError for another number of classes than in the first call."""
    if logits.shape[1] != classes:
        raise ValueError(f"the model must return {classes} logits for each image, got {logits.shape[1]}")
    return logits


def check_leaves_images(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Refuse a model that writes to its input in any way; the model is called on copies, with and without gradients."""
    for recorded in (False, True):
        images = x.detach().clone().requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            try:
                logits_of(model, images)
            except WritesToItsInput:
                raise
            except Exception:
                # A model that fails only while gradients are recorded can be evaluated, so the error is ignored.
                if not recorded:
                    raise
        if not torch.equal(images.detach(), x.detach()):
            raise WritesToItsInput


def predicts_otherwise(model: Classifier, x: Tensor, most: int) -> bool:
    """Return True if two predictions of the same images ``x`` differ, in passes of at most ``most`` images."""
    return any(differ(model(part.clone()), model(part.clone())) for part in x.split(most))


def draws_elsewhere(model: Classifier, x: Tensor, most: int) -> bool:
    """Return True if two predictions differ on images, on noisy images, or on means of two images.

    Some defences draw only for images that are not on the grid of 8 bits, or of whose class they are not sure.
    """
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x) - 0.5
    tried = (x, (x + noise / 16).clamp(0, 1), (x + x.roll(1, 0).flip(-1)) / 2)
    return any(predicts_otherwise(model, images, most) for images in tried)
