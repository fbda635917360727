"""Held-out images during a training: how good its result would be now, and the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._files import with_room
from .._process import processes
from .checkpoint import read_tree, write_tree
from .distributed import from_first
from .run import Run
from .sources import RawBatch, Source, step_seed
from .task import Metrics

#: Images that show what a task measures, before it is trained.
_LOOK = 8


@contextmanager
def finished(run: Run) -> Iterator[None]:
    """Within the block, the model is as if the run ended here, in evaluation mode; then it goes on as it was."""
    state = {name: value.clone() for name, value in run.task.model.state_dict().items()}
    run.task.finish()
    run.task.model.eval()
    try:
        yield
    finally:
        run.task.model.load_state_dict(state)


class Validation:
    """Validates a run and keeps its best weights; every process does all of it.

    Args:
        run: the run.
        source: held-out images, all of them in every process.
    """

    def __init__(self, run: Run, source: Source):
        self.run, self.source = run, source
        #: where the best weights are; without a folder they stay in memory
        self.path = None if run.folder is None else run.folder / "best.safetensors"
        self._best: dict[str, Tensor] | None = None

    def due(self, epoch: int) -> bool:
        """Whether to validate at the end of an epoch; always at the last one's."""
        config = self.run.config
        return (epoch + 1) % config.validation_every == 0 or epoch + 1 == config.epochs

    def check(self) -> None:
        """Refuse a choice of the best by something that the task does not measure, by a look at a few images.

        Every task measures the loss: nothing is computed if the best is chosen by it, or not at all.

        Raises:
            ValueError: the message names what the task measures.
        """
        chosen = self.run.config.keep_best
        if chosen in ("off", "loss"):
            return
        raw = next(self.source.epoch(0, 0))
        with finished(self.run):
            measured = self._measure_batch((raw[0][:_LOOK], raw[1][:_LOOK], raw[2][:_LOOK]))
        if chosen not in measured:
            raise ValueError(f"keep_best {chosen!r}: this training measures {', '.join(measured)}")

    def __call__(self) -> dict[str, float]:
        """Validate now, and keep the weights if they are the best so far.

        Returns:
            The means over the held-out images, by names that begin with ``validation_``.
        """
        with finished(self.run):
            # drawn with the first process's noise, so that all agree on the best
            here = self._measure()
            measured: dict[str, float] = from_first(lambda: here)
            chosen = self.run.config.keep_best
            if chosen != "off":
                self._keep(-measured["loss"] if chosen == "loss" else measured[chosen])
        return {f"validation_{name}": value for name, value in measured.items()}

    def _measure(self) -> dict[str, float]:
        sums, count = dict[str, Tensor](), 0
        for raw in self.source.epoch(0, 0):
            size = len(raw[0])
            for name, value in self._measure_batch(raw).items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + size * value
            count += size
        return {name: float(value) / count for name, value in sums.items()}

    def _measure_batch(self, raw: RawBatch) -> Metrics:
        # the same draws every time, and the last epoch's attack, so that the numbers can be compared
        seed = step_seed(self.run.config.seed, 2**31)
        torch.manual_seed(seed)
        return self.run.task.validate(self.run.batch(raw, self.run.total - 1, seed, augment=False))

    def _keep(self, score: float) -> None:
        # A score that is not a number is never the best, and one that is takes the place of one that is not.
        if math.isnan(score) or (self.run.best and score <= self.run.best["score"]):
            return
        self.run.best = {"score": score, "step": self.run.step}
        state = self.run.task.model.state_dict()
        if self.path is None:
            self._best = {name: value.clone() for name, value in state.items()}
        elif processes()[0] == 0:
            path = self.path
            with_room(lambda: write_tree(path, {"model": state}), path, self.run.config.on_full)

    def load_best(self) -> None:
        """Put the best weights into the model; without any, for no score was a number, it stays as it is.

        Raises:
            FileNotFoundError: the file that held them is gone.
        """
        if not self.run.best:
            return
        path = self.path
        if path is None:
            if self._best is not None:
                self.run.task.model.load_state_dict(self._best)
            return
        self.run.task.model.load_state_dict(from_first(lambda: read_tree(path))["model"])
