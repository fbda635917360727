"""Finds the first loss of a training that is not finite, and writes the images of its step to a file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic
from .sources import RawBatch, Source, step_seed

#: Number of steps between two checks of the losses. Each check waits for the device.
INTERVAL = 100
#: Limit, in bytes, for the batches that are held in memory if the source cannot produce them again.
REMEMBERED = 2**28
#: The file with the images, labels and seed of the step whose loss was not finite.
RECORD = "diverged.npz"


class Diverged(FloatingPointError):
    """Raised if the loss or a weight is not finite, or if the accuracy of a validation collapsed.

    Args:
        text: the message.
        step: the first step, counted from 0, whose loss was not finite; None if no such step is known.
    """

    def __init__(self, text: str, step: int | None = None):
        super().__init__(text)
        self.step = step


class LossWatch:
    """Stores an epoch's last losses on the device, and checks them every `INTERVAL` steps.

    The losses are means over all processes, so all processes find the same step.
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.losses, self.batches = dict[int, Tensor](), dict[int, RawBatch]()

    def add(self, step: int, loss: Tensor, raw: RawBatch) -> None:
        """Add the loss and the batch of a step. A check raises Diverged if it finds a loss that is not finite."""
        self.losses[step] = loss
        if not self.source.reproducible:
            self.batches[step] = raw
            if len(self.batches) > max(1, min(INTERVAL, REMEMBERED // sum(part.nbytes for part in raw))):
                del self.batches[min(self.batches)]
        if (step + 1) % INTERVAL == 0:
            if (bad := self.first_bad()) is not None:
                raise Diverged(f"the loss of step {bad} is not finite", bad)
            self.losses = {}

    def first_bad(self) -> int | None:
        """Return the first step since the last check whose loss is not finite, or None. This waits for the device."""
        finite = torch.stack([*self.losses.values()]).isfinite().tolist() if self.losses else []
        return next((step for step, good in zip(self.losses, finite, strict=True) if not good), None)

    def record(self, step: int, folder: Path) -> Path | None:
        """Write the images, labels, indices and seed of a step to a file.

        Returns:
            Path of the file. None if the source cannot produce the images again and they are no longer in memory.
        """
        raw = self.batches.get(step)
        if self.source.reproducible:
            # the generator may read further batches in a thread, which ends when the generator is closed
            with closing(self.source.epoch(*divmod(step, self.source.steps))) as batches:
                raw = next(batches)
        if raw is None:
            return None
        images, labels, indices = (part.cpu().numpy() for part in raw)
        facts: dict[str, Any] = {"step": step, "seed": step_seed(self.seed, step), "epoch": step // self.source.steps}
        with atomic(folder / RECORD) as temporary:
            np.savez(temporary, images=images, labels=labels, indices=indices, **facts)
        return folder / RECORD
