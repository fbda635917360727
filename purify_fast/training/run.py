"""A run on the way: what its checkpoints hold, when they are written, and whether one may be resumed."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._lock import folder_lock
from .._process import processes
from .checkpoint import CHECKPOINT, last_checkpoint, save_checkpoint
from .config import FitConfig
from .distributed import from_first, gathered
from .divergence import Diverged, LossWatch
from .epoch import finite
from .length import RunLength
from .sources import Source
from .task import Task

logger = logging.getLogger("purify_fast")

#: Settings of the loop that say how a run is carried out, not what comes of it.
NO_FACTS = ("checkpoint_seconds", "on_full", "on_nan", "cuda_graphs", "cudnn_benchmark", "fused_optimizers")
#: The files that a run writes, without what follows the dot: half-written ones have a dot and a hyphen around it.
WRITTEN = (Path(CHECKPOINT).stem, "best", "diverged", "log", "model", "run")
#: How often a run backs off, and what its learning rate is multiplied with each time.
BACK_OFFS, BACK_OFF = 5, 0.5


class Run:
    """Where a run is, and what makes it this run and no other.

    Args:
        task: what is trained.
        config: how long and how.
        source: the images.
        validation: what the run is validated with, if that is not a share of the images.

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

    def __init__(self, task: Task, config: FitConfig, source: Source, validation: str | None = None):
        self.task, self.config, self.steps = task, config, source.steps
        settings = asdict(config)
        for name in NO_FACTS:
            del settings[name]
        self.facts = {"data": source.description, **settings, **task.describe()}
        if validation is not None:
            self.facts["validation"] = validation
        self.length = RunLength(config.epochs, source.steps, source.batch_size, source.images)
        self.terms = task.acts_from_step = task.terms(self.length)
        self.total, self.step = self.length.steps, 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.rate = 1.0
        self.served: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.task.optimizers.items()}
        weights = {"model": self.task.model.state_dict(), "optimizers": optimizers}
        progress = {"step": self.step, "last": self.last, "sums": self.sums, "counts": self.counts}
        progress |= {"best": self.best, "rate": self.rate}
        return {**weights, "facts": self.facts, "served": self.served, **progress}

    def load(self, saved: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint.

        Args:
            saved: what `state` gave.
            device: of the images.
        """
        self.task.model.load_state_dict(saved["model"])
        for name, optimizer in self.task.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        self.step, self.last, self.best = saved["step"], saved["last"], saved["best"]
        self.rate, self.served = saved["rate"], saved["served"]
        self.sums = {key: value.to(device) for key, value in saved["sums"].items()}
        self.counts = saved["counts"]

    def add(self, measured: Mapping[str, Tensor], device: torch.device) -> None:
        """Add a step's losses and metrics to those of its epoch.

        Args:
            measured: by name; a term that does not act yet measures nothing.
            device: of the images.
        """
        for key, value in measured.items():
            wide = torch.promote_types(value.dtype, torch.float32)
            self.sums[key] = self.sums[key] + value if key in self.sums else value.to(device, wide, copy=True)
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """The means of the epoch's losses and metrics over the steps that measured them; waits for the device."""
        return {key: float(value) / self.counts[key] for key, value in self.sums.items()}

    def healthy(self) -> bool:
        """Whether this epoch's losses and the weights are finite so far; waits for the device."""
        groups = (group for optimizer in self.task.optimizers.values() for group in optimizer.param_groups)
        weights = [weight for group in groups for weight in group["params"]]
        statistics = [
            buffer
            for name, buffer in self.task.model.named_buffers()
            if name.endswith(("running_mean", "running_var")) and buffer.is_floating_point()
        ]
        return finite([*self.sums.values(), *weights, *statistics])


def differences(saved: dict[str, Any], wanted: dict[str, Any], there: str, here: str) -> str:
    """What two runs' facts disagree on, in words; empty if on nothing.

    Args:
        saved: one run's facts, as JSON values.
        wanted: the other's.
        there: what the first is called behind its values.
        here: what the second is called.
    """
    wanted = json.loads(json.dumps(wanted))
    different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    return "; ".join(f"{key}: {saved.get(key)!r} {there}, {wanted.get(key)!r} {here}" for key in different)


#: Kinds of training as a message names them.
_NAMES = {"carso": "a CARSO", "atop": "an AToP", "arrest": "an ARREST", "classifier": "a classifier's"}


def refuse_another(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run that is not the same.

    Args:
        folder: where it is.
        saved: its facts.
        wanted: this run's.

    Raises:
        ValueError: the message names what differs.
    """
    advice = "give another folder, or remove it"
    kinds = [_NAMES.get(facts["task"], f"a {facts['task']}") for facts in (saved, wanted)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{folder} holds {kinds[0]} run, and this is {kinds[1]} run: {advice}")
    if found := differences(saved, wanted, "there", "now"):
        raise ValueError(f"{folder} holds a run with other settings ({found}): {advice}")


class Checkpointer:
    """Reads and writes a run's checkpoint, in the first process alone.

    Args:
        run: the run.
        folder: where ``checkpoint.safetensors`` and the one before it are kept; None keeps nothing.
        within_epochs: whether a run can be resumed in the middle of an epoch.
    """

    def __init__(self, run: Run, folder: Path | None, within_epochs: bool):
        self.run, self.folder, self.within_epochs = run, folder, within_epochs
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block, no other run writes into the folder; several processes are refused together.

        Raises:
            FolderInUse: another run does.
        """
        with contextlib.ExitStack() as stack:
            from_first(lambda: stack.enter_context(folder_lock(self.folder)))
            yield

    def resume(self, device: torch.device) -> None:
        """Go on from the checkpoint, if there is one; several processes begin from what the first has in any case.

        Args:
            device: of the images.

        Raises:
            ValueError: a checkpoint of another run, or other data or settings in another process.
        """
        saved = from_first(self._read)
        if saved is None:
            return
        found = gathered(differences(saved["facts"], self.run.facts, "in the first", "there"))
        for other, difference in enumerate(found):
            if difference:
                raise ValueError(f"process {other} trains on other data or settings than the first ({difference})")
        self.run.load(saved, device)

    def _read(self) -> dict[str, Any] | None:
        saved = None
        if self.folder is not None:
            # of a run that was killed while it wrote; nobody else writes here, since the folder is locked
            for stem in WRITTEN:
                for stale in self.folder.glob(f".{stem}-*"):
                    stale.unlink()
            saved = last_checkpoint(self.folder, set_aside=True)
        if self.folder is None or saved is None:
            return None if processes()[1] == 1 else self.run.state()
        refuse_another(self.folder, saved["facts"], self.run.facts)
        return saved

    def save(self) -> None:
        """Write the checkpoint."""
        # without the other processes, so that they need not agree on when
        if self.folder is not None and processes()[0] == 0:
            save_checkpoint(self.folder, self.run.state(), self.run.config.on_full)
        self.saved_at = time.monotonic()

    def save_if_due(self, now: bool = False) -> None:
        """Write the checkpoint in the middle of an epoch, if the last one is old enough and the numbers are finite.

        Args:
            now: whether it is due in any case.

        Raises:
            Diverged: they are not; the last checkpoint stays.
        """
        due = now or time.monotonic() - self.saved_at >= self.run.config.checkpoint_seconds
        if self.folder is None or not due or not self.within_epochs:
            return
        if self.run.healthy():
            self.save()
        elif processes()[1] == 1:
            raise Diverged("a loss or a weight is not finite", None)
        # of several processes this one alone knows now: all of them see it when they look at their losses

    def back_off(self, error: Diverged, watch: LossWatch) -> None:
        """After a divergence: return to the last checkpoint with a smaller learning rate, or end the run.

        Args:
            error: what was found.
            watch: the run's losses.

        Raises:
            Diverged: the run is to end, or has backed off often enough; the message says what to change.
        """
        run = self.run
        step = watch.first_bad() if error.step is None else error.step
        explained = self._explained(step, watch)
        scale = run.rate * BACK_OFF
        if run.config.on_nan == "stop" or scale < BACK_OFF**BACK_OFFS:
            raise Diverged(explained, step) from error
        found = from_first(self._read)
        assert found is not None
        watch.forget()
        run.load(found, watch.source.device)
        run.rate = scale
        if processes()[0] == 0:
            logger.warning("%s; back to step %d with %g of the learning rate", explained, run.step, scale)

    def _explained(self, step: int | None, watch: LossWatch) -> str:
        run, config = self.run, self.run.config
        epoch = (run.step - 1 if step is None else step) // run.steps
        shown = ", ".join(f"{name} {value:.4g}" for name, value in run.means().items())
        where = "a weight is not finite" if step is None else f"the loss of step {step} is not finite"
        text = f"epoch {epoch}: training diverged, {where} (means of the epoch: {shown}); the last checkpoint is kept"
        if step is not None and self.folder is not None and processes()[0] == 0:
            path = watch.record(step, run.steps, self.folder)
            text += f"; its images, labels and seed are in {path}" if path is not None else ""
        rate = next(iter(run.task.optimizers.values())).param_groups[0]["lr"]
        text += f". Lower the learning rate ({rate:.3g} here), let eps rise over more epochs (eps_warmup), or train in "
        text += "float32 if this is bfloat16"
        if config.on_nan == "stop":
            text += "; on_nan back_off halves the rate by itself"
        return text
