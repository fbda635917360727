"""``batch_size="auto"``: choose by the available memory how many images go through the models at once.

Images are attacked in batches of the usual size, whatever the memory: an attack that searches the images nearest to a
border first chooses within a batch. Memory decides how many of a batch's images, and of their draws, share a pass of
the model. This changes no result of a model that answers the same every time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from .._memory import bytes_of
from ..attacks.arguments import check_at_least_one
from ..attacks.objective import Objective
from ..protocols import Classifier
from ..speed.memory import Room, free_memory, images_that_fit
from .cache import RowCache
from .config import USUAL_BATCH, BatchSize
from .subject import Subject

logger = logging.getLogger("purify_fast")

#: An attack is assumed to keep this many tensors of the size of the attacked images in memory.
REMEMBERED = 16


def images_together(batch_size: BatchSize, memory: int | str | None) -> int:
    """The number of images that are attacked together.

    Args:
        batch_size: a number, or "auto".
        memory: memory that an automatic batch may take; None: all that is free.

    Raises:
        ValueError: batch_size is neither a number nor "auto", or memory cannot be used.
    """
    if batch_size == "auto":
        if memory is not None:
            bytes_of(memory)
        return USUAL_BATCH
    if isinstance(batch_size, str):
        raise ValueError(f'batch_size must be a number or "auto", got {batch_size!r}')
    if memory is not None:
        raise ValueError(
            f'memory={memory!r} needs batch_size="auto", got batch_size={batch_size}: give batch_size="auto", or leave '
            "memory out"
        )
    check_at_least_one(batch_size=batch_size)
    return batch_size


def make_room(subject: Subject, models: Iterable[Classifier], memory: int | str | None, cache: RowCache) -> None:
    """Measure the number of images that fit into memory, and set the subject's room to it.

    Args:
        subject: the model with its images; within `purify_fast.attacks.frozen`.
        models: the models through which gradients are taken.
        memory: memory that the process may take in total; None: all that is free.
        cache: keeps the number. A resumed run uses it again if it still fits, since a random model's draws depend on
            it.
    """
    device = subject.device
    # An attack keeps tensors for all images of a batch, however few of them go through the model at once.
    remembered = REMEMBERED * subject.x[: subject.batch_size].nbytes
    images = subject.room.images
    for model in models:
        objective = Objective(model, "ce")

        def gradient(count: int, objective: Objective = objective) -> object:
            some = torch.arange(count) % len(subject.x)
            x, y = subject.x[some.to(subject.x.device)], subject.y[some.to(subject.y.device)]
            return objective.gradient(x.to(device), y.to(device))

        fitting = images_that_fit(gradient, free_memory(device, memory) - remembered, device)
        # A model may keep its last input, which is a part of its fingerprint. Show it the sample images again, so that
        # this measurement leaves no trace.
        model(subject.sample_images())
        images = fitting if images is None else min(images, fitting)
    if images is not None:
        name = cache.key({"images at once": subject.data}, subject.model)
        kept: int = cache.values(name, lambda: {"images": images})["images"]
        images = min(images, kept)
        logger.info("%d images go through the model at once", images)
    subject.room = Room(images, device, yields=True)
