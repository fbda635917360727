"""How far an evaluation is: a bar on a terminal, plain lines in a log; images per second and the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from .watched import progress_bar

#: Seconds between two lines of a log, at least.
LINE_EVERY = 30.0


class Counter(Protocol):
    """Is told how many images went through a model."""

    def update(self, images: int) -> object:
        """Count them."""


class Progress:
    """The progress of one evaluation.

    Args:
        name: of the model.
        shown: whether to show anything.
        costs: forward passes of single images that each row takes at most, in order, and the probes as one more row;
            None where it is not known.
    """

    def __init__(self, name: str, shown: bool, costs: Sequence[int | None]):
        self.name, self.shown = name, shown
        self.lines = shown and not sys.stderr.isatty()
        self.costs = list(costs)
        self.at, self.done, self.in_row = 0, 0, 0
        self.began = self.last_line = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the evaluation began."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def row(self, label: str, total: int | None) -> Iterator[Counter]:
        """Within the block, one row is made.

        Args:
            label: of the row.
            total: forward passes of single images at most; None: not known.
        """
        self.in_row = 0
        place = f"{self.at + 1} of {max(len(self.costs), self.at + 1)}"
        with progress_bar(f"{self.name}: {label} ({place})", self.shown and not self.lines, total) as bar:
            yield _Both(self, bar, f"{place}, {label}")
        self.kept(self.at)

    def kept(self, at: int) -> None:
        """A row is there; nothing is left to do for it if an earlier run made it.

        Args:
            at: how many rows were there before it.
        """
        self.at, self.in_row = at + 1, 0

    def count(self, images: int, label: str) -> None:
        """Images went through the model; a log gets a line now and then.

        Args:
            images: how many.
            label: of the row.
        """
        self.done += images
        self.in_row += images
        now = time.monotonic()
        if self.lines and now - self.last_line >= LINE_EVERY:
            self.last_line = now
            print(f"{self.name}: row {label}: {self.rate():,.0f} images/s, {self.left()}", file=sys.stderr, flush=True)

    def finished(self, result: str) -> None:
        """A row is finished: a log gets its result.

        Args:
            result: the row in short.
        """
        if self.lines:
            self.last_line = time.monotonic()
            print(f"{self.name}: {result} ({duration(self.seconds)}, {self.left()})", file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Images per second through the model so far."""
        return self.done / max(self.seconds, 1e-9)

    def left(self) -> str:
        """The time that the rows still to be made take at most, in words."""
        rest = self.costs[self.at :]
        if not rest:
            return "the last row"
        known = sum(cost for cost in rest if cost is not None)
        if rest[0] is not None:
            known -= min(rest[0], self.in_row)
        if not self.done:
            return "time left not known yet"
        if not known and None in rest:
            return "time left not known"
        text = f"{duration(known / self.rate())} left at most"
        return text if None not in rest else f"{text}, and rows whose length is not known"


class _Both:
    """Counts for the bar of a row and for the whole evaluation."""

    def __init__(self, progress: Progress, bar: Counter, label: str):
        self.progress, self.bar, self.label = progress, bar, label

    def update(self, images: int) -> None:
        """Count images that went through the model."""
        self.bar.update(images)
        self.progress.count(images, self.label)


def duration(seconds: float) -> str:
    """A time in words, such as ``1 h 4 min``.

    Args:
        seconds: how long.
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
