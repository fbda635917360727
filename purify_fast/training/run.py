"""A run on the way: where it is, what makes it this run and no other, its checkpoints, and its last losses."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic, folder_lock
from .._process import processes
from ..data import crop_flip, to_float
from .checkpoint import CHECKPOINT, last_checkpoint, save_checkpoint
from .config import FitConfig
from .distributed import from_first, gathered
from .optimizers import weights_of
from .schedules import RunLength
from .sources import RawBatch, Source, step_seed
from .task import Batch, Task

#: Settings of the loop that say how a run is carried out, not what comes of it.
_NO_FACTS = ("checkpoint_seconds", "on_full", "on_nan", "cuda_graphs", "cudnn_benchmark", "fused_optimizers")
#: The files that a run writes, without what follows the dot: half-written ones have a dot and a hyphen around it.
_WRITTEN = (Path(CHECKPOINT).stem, "best", "diverged", "log", "model", "run")

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


class Run:
    """Where a run is, what makes it this run and no other, and its checkpoints, which the first process writes.

    Args:
        task: what is trained.
        config: how.
        source: of its images. A run whose source is not reproducible is resumed at the end of an epoch only.
        folder: for its checkpoints; None keeps none.
        validation: the description of held-out images that were given.

    Attributes:
        facts: what must be equal for a checkpoint to be resumed.
        length: of the whole run.
        terms: the terms of the loss, and the step from which on each acts.
        total: steps of the whole run.
        step: steps taken.
        sums: of the epoch's losses and metrics so far, by name.
        counts: the steps of the epoch that measured each of them.
        last: the last epoch's means.
        best: the best validation so far: its ``score`` and its ``step``; empty without one.
        served: what decides which kernels serve, by `purify_fast.ops.kernel_choices` when the run began; None before.
        rate: what the task's learning rate is multiplied with: 1, and less after a divergence that was backed off from.
    """

    def __init__(
        self, task: Task, config: FitConfig, source: Source, folder: Path | None = None, validation: str | None = None
    ):
        self.task, self.config, self.source, self.folder, self.steps = task, config, source, folder, source.steps
        self.facts = {"data": source.description, **loop_facts(config), **task.describe()}
        if validation is not None:
            self.facts["validation"] = validation
        self.length = RunLength(config.epochs, source.steps, source.batch_size, source.images)
        self.terms = task.acts_from_step = task.terms(self.length)
        self.total, self.step, self.rate, self.saved_at = self.length.steps, 0, 1.0, time.monotonic()
        self.sums, self.counts = dict[str, Tensor](), dict[str, int]()
        self.last, self.best = dict[str, float](), dict[str, float]()
        self.served: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.steps

    def batch(self, raw: RawBatch, step: int, seed: int, augment: bool = True) -> Batch:
        """The input of a step: what the source gave, as floats, cropped and mirrored as the settings say."""
        images, labels, ids = raw
        config, epoch = self.config, step // self.steps
        x = to_float(images) if images.dtype == torch.uint8 else images
        if augment and (config.padding or config.flip):
            x = crop_flip(x, config.seed, ids, config.padding, config.flip, epoch=epoch)
        before = self.length.images_before(step)
        return Batch(x, labels, ids, seed, epoch=epoch, epochs=config.epochs, step=step, images_before=before)

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Add a step's losses and metrics to those of its epoch; a term that does not act yet measures nothing."""
        for key, value in measured.items():
            wide = torch.promote_types(value.dtype, torch.float32)
            new = key not in self.sums
            self.sums[key] = value.to(self.source.device, wide, copy=True) if new else self.sums[key] + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """The means of the epoch's losses and metrics over the steps that measured them; waits for the device."""
        return {key: float(value) / self.counts[key] for key, value in self.sums.items()}

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise Diverged unless this epoch's losses and the weights are finite so far; waits for the device once."""
        weights = [weight for optimizer in self.task.optimizers.values() for weight in weights_of(optimizer)]
        statistics = [
            buffer
            for name, buffer in self.task.model.named_buffers()
            if name.endswith(("running_mean", "running_var")) and buffer.is_floating_point()
        ]
        checks = [value.isfinite().all() for value in (*self.sums.values(), *weights, *statistics)]
        if checks and not torch.stack(checks).all():
            raise Diverged("a loss or a weight is not finite")

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.task.optimizers.items()}
        weights = {"model": self.task.model.state_dict(), "optimizers": optimizers}
        progress = {"step": self.step, "last": self.last, "sums": self.sums, "counts": self.counts}
        progress |= {"best": self.best, "rate": self.rate}
        return {**weights, "facts": self.facts, "served": self.served, **progress}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block, no other run writes into the folder; several processes are refused together.

        Raises:
            FolderInUse: another run does.
        """
        with contextlib.ExitStack() as stack:
            from_first(lambda: stack.enter_context(folder_lock(self.folder)))
            yield

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; several processes begin from what the first has in any case.

        Raises:
            ValueError: a checkpoint of another run, or other data or settings in another process.
        """
        saved = from_first(self._read)
        if saved is None:
            return
        here = differences(saved["facts"], self.facts, "in the first", "there")
        for rank, difference in enumerate(gathered(here)):
            if difference:
                raise ValueError(f"process {rank} trains on other data or settings than the first ({difference})")
        self.task.model.load_state_dict(saved["model"])
        for name, optimizer in self.task.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        for name in ("step", "last", "best", "rate", "served", "counts"):
            setattr(self, name, saved[name])
        self.sums = {key: value.to(self.source.device) for key, value in saved["sums"].items()}

    def _read(self) -> dict[str, Any] | None:
        saved = None
        if self.folder is not None:
            # of a run that was killed while it wrote; nobody else writes here, since the folder is locked
            for stem in _WRITTEN:
                for stale in self.folder.glob(f".{stem}-*"):
                    stale.unlink()
            saved = last_checkpoint(self.folder, set_aside=True)
        if self.folder is None or saved is None:
            return None if processes()[1] == 1 else self.state()
        refuse_another(self.folder, saved["facts"], self.facts)
        return saved

    def save(self) -> None:
        """Write the checkpoint."""
        # without the other processes, so that they need not agree on when
        if self.folder is not None and processes()[0] == 0:
            save_checkpoint(self.folder, self.state(), self.config.on_full)
        self.saved_at = time.monotonic()

    def save_if_due(self, now: bool = False) -> None:
        """Write the checkpoint in the middle of an epoch if it is due: ``now``, or because the last one is old enough.

        Raises:
            Diverged: a number is not finite; the last checkpoint stays.
        """
        due = now or time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if self.folder is None or not due or not self.source.reproducible:
            return
        try:
            self.check_finite()
        except Diverged:
            # of several processes this one alone knows now: all of them see it when they look at their losses
            if processes()[1] == 1:
                raise
            return
        self.save()


def loop_facts(config: FitConfig) -> dict[str, Any]:
    """The loop's settings that decide what comes of a run."""
    return {name: value for name, value in asdict(config).items() if name not in _NO_FACTS}


def differences(saved: dict[str, Any], wanted: dict[str, Any], there: str, here: str) -> str:
    """What two runs' facts disagree on, in words; empty if on nothing. ``there`` and ``here`` say whose a value is."""
    # in the JSON of a checkpoint a tuple is a list
    saved, wanted = (json.loads(json.dumps(facts)) for facts in (saved, wanted))
    different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    return "; ".join(f"{key}: {saved.get(key)!r} {there}, {wanted.get(key)!r} {here}" for key in different)


def refuse_another(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError if a folder's checkpoint has the facts ``saved`` of another run; the message names what differs."""
    advice = "give another folder, or remove it"
    if saved["task"] != wanted["task"]:
        kinds = f"holds a run of the training {saved['task']!r}, and this is one of {wanted['task']!r}"
        raise ValueError(f"{folder} {kinds}: {advice}")
    if difference := differences(saved, wanted, "there", "now"):
        raise ValueError(f"{folder} holds a run with other settings ({difference}): {advice}")


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
            raw = self._batches.get(number)
            if self.source.reproducible and number >= 0:
                # closed, so that what reads ahead ends
                with closing(self.source.epoch(*divmod(number, self.source.steps))) as batches:
                    raw = next(batches, None)
            if raw is None:
                continue
            parts: dict[str, Any] = dict(
                zip(("images", "labels", "indices"), (p.cpu().numpy() for p in raw), strict=True)
            )
            parts |= {"step": number, "seed": step_seed(self.seed, number), "epoch": number // self.source.steps}
            arrays |= {prefix + name: value for name, value in parts.items()}
        if "images" not in arrays:
            return None
        with atomic(folder / RECORD) as temporary:
            np.savez(temporary, **arrays)
        return folder / RECORD
