"""Chooses the number of images in each pass of the model for ``batch_size="auto"``.

The batches of an attack always have the usual size, because the result of some attacks depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from ...attacks.objective import Objective
from ...protocols import Classifier
from ...speed.memory import Room, free_memory, images_that_fit
from ..request.subject import Subject
from .cache import RowCache

logger = logging.getLogger("purify_fast")

#: An attack is assumed to keep this number of tensors in memory, each as large as the attacked images.
REMEMBERED = 16


def make_room(subject: Subject, models: Iterable[Classifier], cache: RowCache) -> None:
    """Measure how many images of a pass fit into memory, and store the number in ``subject.room``."""
    device = subject.device
    # An attack keeps tensors for all images of a batch, even if only a few of them are in a pass of the model.
    remembered = REMEMBERED * subject.x[: subject.batch_size].nbytes
    images = subject.room.images
    for model in models:
        objective = Objective(model, "ce")

        def gradient(count: int, objective: Objective = objective) -> object:
            some = torch.arange(count, device="cpu") % len(subject.x)
            x, y = subject.x[some.to(subject.x.device)], subject.y[some.to(subject.y.device)]
            return objective.gradient(x.to(device), y.to(device))

        fitting = images_that_fit(gradient, free_memory(device) - remembered, device)
        # A model's last input may be a part of its fingerprint. This call makes that independent of the measurement.
        model(subject.sample_images())
        images = fitting if images is None else min(images, fitting)
    if images is not None:
        name = cache.key({"images at once": subject.data}, subject.model)
        kept: int = cache.values(name, lambda: {"images": images})["images"]
        images = min(images, kept)
        logger.info("each pass of the model has at most %d images", images)
    subject.room = Room(images, device, yields=True)
