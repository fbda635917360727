"""A training whose loss is no number any more: the step is named, and its images are written down."""

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
#: Bytes of batches that are remembered of a source that cannot give them again.
REMEMBERED = 2**28
#: The file with the images, labels and seed of the step whose loss was no number.
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
    """Keeps the losses of the last steps on the device, and looks at them every `INTERVAL` steps.

    All of several processes see the same means at the same steps, so that they come to the same answer.
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after a return to an earlier step."""
        self._losses = torch.zeros(INTERVAL, device=self.source.device)
        self._last = -1
        self._batches: dict[int, RawBatch] = {}

    def add(self, step: int, loss: Tensor, raw: RawBatch) -> None:
        """Add a step's loss, and the step's batch as the source gave it; Diverged if a look finds a loss not finite."""
        self._losses[step % INTERVAL].copy_(loss.detach())
        self._last = step
        if not self.source.reproducible:
            self._batches[step] = raw
            size = sum(part.nbytes for part in raw)
            while len(self._batches) > max(2, min(INTERVAL + 1, REMEMBERED // size)):
                del self._batches[min(self._batches)]
        if (step + 1) % INTERVAL == 0 and (bad := self.first_bad()) is not None:
            raise Diverged(f"the loss of step {bad} is not finite", bad)

    def first_bad(self) -> int | None:
        """The first of the last steps whose loss is not finite, None if there is none; waits for the device."""
        bad = ~self._losses.cpu().isfinite()
        steps = range(max(0, self._last + 1 - INTERVAL), self._last + 1)
        return next((step for step in steps if bad[step % INTERVAL]), None)

    def record(self, step: int, folder: Path) -> Path | None:
        """Write the images, labels, indices and seeds of a step and of the one before it, whose weights it had.

        Returns:
            The file; None if the source cannot give its images again, and they are no longer remembered.
        """
        arrays: dict[str, Any] = {}
        for prefix, number in (("", step), ("before_", step - 1)):
            raw = self._batch(number) if number >= 0 else None
            if raw is None:
                continue
            for name, part in zip(("images", "labels", "indices"), raw, strict=True):
                arrays[prefix + name] = part.cpu().numpy()
            facts = {"step": number, "seed": step_seed(self.seed, number), "epoch": number // self.source.steps}
            arrays |= {prefix + name: value for name, value in facts.items()}
        if "images" not in arrays:
            return None
        with atomic(folder / RECORD) as temporary:
            np.savez(temporary, **arrays)
        return folder / RECORD

    def _batch(self, step: int) -> RawBatch | None:
        if not self.source.reproducible:
            return self._batches.get(step)
        # closed, so that what reads ahead ends
        with closing(self.source.epoch(*divmod(step, self.source.steps))) as batches:
            return next(batches, None)
