"""The watch over the losses of a training: it finds the first that is not finite, and keeps the images of its step."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic
from .sources import RawBatch, Source, step_seed

#: Steps from one look at the losses to the next: each look waits for the device.
INTERVAL = 100
#: Bytes of batches to remember if the source cannot repeat them.
REMEMBERED = 2**28
#: The file with the images, labels and seed of the step whose loss was not finite.
RECORD = "diverged.npz"


class Diverged(FloatingPointError):
    """The loss, or a weight, is not finite.

    Args:
        text: the message.
        step: the first step whose loss was not finite, from 0; None if no loss was, but a weight.
    """

    def __init__(self, text: str, step: int | None = None):
        super().__init__(text)
        self.step = step


class LossWatch:
    """Keeps an epoch's last losses on the device, and looks at them every `INTERVAL` steps.

    All of several processes see the same means at the same steps, so that they come to the same answer.
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.losses, self.batches = dict[int, Tensor](), dict[int, RawBatch]()

    def add(self, step: int, loss: Tensor, raw: RawBatch) -> None:
        """Add a step's loss and its batch from the source; Diverged if a look finds a loss that is not finite."""
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
        """The first step since the last look whose loss is not finite, None if there is none; waits for the device."""
        finite = torch.stack([*self.losses.values()]).isfinite().tolist() if self.losses else []
        return next((step for step, good in zip(self.losses, finite, strict=True) if not good), None)

    def record(self, step: int, folder: Path) -> Path | None:
        """Write the images, labels, indices and seed of a step.

        Returns:
            The file; None if the source cannot repeat its images, and they are no longer remembered.
        """
        raw = self.batches.get(step)
        if self.source.reproducible:
            # close it, so that its reading ahead ends
            with closing(self.source.epoch(*divmod(step, self.source.steps))) as batches:
                raw = next(batches)
        if raw is None:
            return None
        images, labels, indices = (part.cpu().numpy() for part in raw)
        facts: dict[str, Any] = {"step": step, "seed": step_seed(self.seed, step), "epoch": step // self.source.steps}
        with atomic(folder / RECORD) as temporary:
            np.savez(temporary, images=images, labels=labels, indices=indices, **facts)
        return folder / RECORD
