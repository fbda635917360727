"""A run on the way: what its checkpoints hold, when they are written, and whether one may be resumed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .._process import processes
from .checkpoint import read_tree, write_tree
from .config import FitConfig
from .distributed import from_first, gathered
from .epoch import finite
from .sources import Source
from .task import Task

#: Settings of the loop that say how a run is carried out, not what comes of it.
NO_FACTS = ("checkpoint_seconds", "cuda_graphs", "cudnn_benchmark", "fused_optimizers")


class Run:
    """Where a run is, and what makes it this run and no other.

    Args:
        task: what is trained.
        config: how long and how.
        source: the images.
        validation: what the run is validated with, if that is not a share of the images.

    Attributes:
        facts: what must be equal for a checkpoint to be resumed.
        total: steps of the whole run.
        step: steps taken.
        sums: of the epoch's losses and metrics so far, by name.
        last: the last epoch's means.
        best: the best validation so far: its ``score`` and its ``step``; empty without one.
    """

    def __init__(self, task: Task, config: FitConfig, source: Source, validation: str | None = None):
        self.task, self.config, self.steps = task, config, source.steps
        settings = asdict(config)
        for name in NO_FACTS:
            del settings[name]
        self.facts = {"data": source.description, **settings, **task.describe()}
        if validation is not None:
            self.facts["validation"] = validation
        self.total, self.step = source.steps * config.epochs, 0
        self.sums: dict[str, Tensor] = {}
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.task.optimizers.items()}
        weights = {"model": self.task.model.state_dict(), "optimizers": optimizers}
        progress = {"step": self.step, "last": self.last, "sums": self.sums, "best": self.best}
        return {**weights, "facts": self.facts, **progress}

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
        self.sums = {key: value.to(device) for key, value in saved["sums"].items()}

    def healthy(self) -> bool:
        """Whether this epoch's losses and the weights are finite so far; waits for the device."""
        groups = (group for optimizer in self.task.optimizers.values() for group in optimizer.param_groups)
        weights = [weight for group in groups for weight in group["params"]]
        return finite([*self.sums.values(), *weights])


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
        folder: where ``checkpoint.safetensors`` is kept; None keeps nothing.
        within_epochs: whether a run can be resumed in the middle of an epoch.
    """

    def __init__(self, run: Run, folder: Path | None, within_epochs: bool):
        self.run, self.within_epochs = run, within_epochs
        self.path = None if folder is None else folder / "checkpoint.safetensors"
        self.saved_at = time.monotonic()

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
        if self.path is not None:
            # of a run that was killed while it wrote
            for stale in self.path.parent.glob(f".{self.path.stem}-*"):
                stale.unlink()
        if self.path is None or not self.path.is_file():
            return None if processes()[1] == 1 else self.run.state()
        saved = _compat.checkpoint(read_tree(self.path))
        refuse_another(self.path.parent, saved["facts"], self.run.facts)
        return saved

    def save(self) -> None:
        """Write the checkpoint."""
        # without the other processes, so that they need not agree on when
        if self.path is not None and processes()[0] == 0:
            write_tree(self.path, self.run.state())
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Write the checkpoint in the middle of an epoch, if the last one is old enough and the numbers are finite.

        Raises:
            FloatingPointError: they are not; the last checkpoint stays.
        """
        due = time.monotonic() - self.saved_at >= self.run.config.checkpoint_seconds
        if self.path is None or not due or not self.within_epochs:
            return
        if self.run.healthy():
            self.save()
        elif processes()[1] == 1:
            raise diverged(f"epoch {self.run.epoch}, step {self.run.step}", self.run.sums)
        # of several processes this one alone knows now: all of them end together with the epoch


def diverged(where: str, values: dict[str, Any]) -> FloatingPointError:
    """The error that ends a run whose numbers are not finite.

    Args:
        where: what the message begins with.
        values: loss and metrics.
    """
    shown = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
    return FloatingPointError(f"{where}: training diverged, {shown}; the last checkpoint is kept")
