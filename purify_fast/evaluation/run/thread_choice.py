"""Chooses the number of threads of an evaluation on a CPU."""

from __future__ import annotations

import contextlib

import torch

from ...attacks.objective import Objective
from ...speed.threads import fastest_threads, may_choose
from ..asked.subject import Subject
from .cache import RowCache

#: The largest number of images on which gradients are timed. Attacks often have fewer images than a batch has.
TIMED = 64


def choose_threads(subject: Subject, cache: RowCache) -> None:
    """Set torch's number of threads to the fastest for a gradient of the model."""
    if not may_choose(subject.device):
        return
    count = subject.room.at_most(min(TIMED, subject.batch_size))
    x, y, objective = subject.x[:count].to(subject.device), subject.y[:count], Objective(subject.model, "ce")

    def step() -> None:
        # If the model refuses gradients, the attacks that need them will say so.
        with contextlib.suppress(Exception):
            objective.gradient(x, y)

    name = cache.key({"threads": [subject.data, torch.get_num_threads()]}, subject.model)
    with torch.random.fork_rng([]):
        chosen: int = cache.values(name, lambda: {"threads": fastest_threads(step)})["threads"]
        # A model's last input may be a part of its fingerprint. This call makes that independent of the measurement.
        subject.model(subject.sample_images())
    torch.set_num_threads(chosen)
