"""A training whose loss is no number any more: found without waiting for the device, and written down."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic
from .sources import Source, step_seed

#: Steps from one look at the losses to the next. A look sees those up to the look before it, which have arrived.
INTERVAL = 100
#: Bytes of batches that are held for a source that cannot give them again.
HELD = 2**28
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
    """Keeps the losses of the last steps on the device, and looks at a copy of them that was made long before.

    All of several processes see the same means at the same steps, so that they find the same.

    Args:
        source: the images.
        seed: the run's.
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after a return to an earlier step."""
        self._losses = torch.zeros(2 * INTERVAL, device=self.source.device)
        self._copied: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._first: int | None = None
        self._last = -1
        self._batches: deque[tuple[int, Tensor, Tensor, Tensor]] = deque()

    def add(self, step: int, loss: Tensor, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        """One step's loss; every `INTERVAL` steps those up to the look before are looked at.

        Args:
            step: the step, from 0.
            loss: its loss, on the device.
            images: the step's, as the source gave them.
            labels: likewise.
            ids: likewise.

        Raises:
            Diverged: a loss was not finite.
        """
        if self._first is None:
            self._first = step
        self._losses[step % len(self._losses)].copy_(loss.detach())
        self._last = step
        if not self.source.reproducible:
            self._hold(step, images, labels, ids)
        if (step + 1) % INTERVAL == 0:
            if self._copied is not None:
                losses, event = self._copied
                if event is not None:
                    event.synchronize()
                # the step of this look itself is at the copy's end
                self._look(losses, step - INTERVAL)
            self._copied = self._copy()

    def _hold(self, step: int, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        self._batches.append((step, images, labels, ids))
        while len(self._batches) > 2 and (
            len(self._batches) > 2 * INTERVAL
            or sum(batch[1].numel() * batch[1].element_size() for batch in self._batches) > HELD
        ):
            self._batches.popleft()

    def _copy(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._losses.device.type != "cuda":
            return self._losses.clone(), None
        copy = torch.empty(len(self._losses), pin_memory=True)
        copy.copy_(self._losses, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._losses.device))
        return copy, event

    def _look(self, losses: Tensor, last: int) -> None:
        step = self._found(losses, last)
        if step is not None:
            raise Diverged(f"the loss of step {step} is {float(losses[step % len(losses)])}", step)

    def _found(self, losses: Tensor, last: int) -> int | None:
        """The first step up to ``last`` whose loss is not finite, among those that are kept."""
        assert self._first is not None
        bad = ~losses.cpu().isfinite()
        steps = range(max(self._first, last + 1 - len(losses)), last + 1)
        return next((step for step in steps if bad[step % len(losses)]), None)

    def first_bad(self) -> int | None:
        """The first of the last steps whose loss is not finite, None if there is none; waits for the device."""
        return None if self._first is None else self._found(self._losses, self._last)

    def record(self, step: int, steps: int, folder: Path) -> Path | None:
        """Write the images, labels, indices and seeds of a step and of the one before it, whose weights it had.

        Args:
            step: the step, from 0.
            steps: of an epoch.
            folder: the run's.

        Returns:
            The file; None if the source cannot give its images again, and they are no longer held.
        """
        found: dict[str, Any] = {}
        for prefix, one in (("", step), ("before_", step - 1)):
            batch = self._batch(one, steps) if one >= 0 else None
            if batch is None:
                continue
            parts = zip(("images", "labels", "indices"), batch, strict=True)
            found |= {f"{prefix}{name}": part.cpu().numpy() for name, part in parts}
            found |= {f"{prefix}step": one, f"{prefix}seed": step_seed(self.seed, one), f"{prefix}epoch": one // steps}
        if "images" not in found:
            return None
        with atomic(folder / RECORD) as temporary:
            np.savez(temporary, **found)
        return folder / RECORD

    def _batch(self, step: int, steps: int) -> tuple[Tensor, Tensor, Tensor] | None:
        for held, *batch in self._batches:
            if held == step:
                return batch[0], batch[1], batch[2]
        if not self.source.reproducible:
            return None
        batches = self.source.epoch(step // steps, step % steps)
        found = next(iter(batches), None)
        close = getattr(batches, "close", None)
        if close is not None:
            # what reads ahead ends now
            close()
        return found
