"""Shows the progress of an evaluation, by a bar on a terminal or by lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """Shows a bar for each row, which counts attacked images, or a line at the begin and at the end of each row."""

    def __init__(self, name: str = "", shown: bool = False):
        self.name, self.shown = name, shown
        self.lines = shown and not sys.stderr.isatty()
        #: The number of rows that are finished, and of all rows; the probes are the first row.
        self.rows = self.total = 0
        self.bar: tqdm[None] | None = None
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time since this object was made."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def row(self, label: str, images: int | None) -> Iterator[None]:
        """A context in which a row is made by attacks on a number of images."""
        text = f"{label} (row {self.rows + 1} of {max(self.total, self.rows + 1)})"
        if self.lines:
            self._print(text)
        hidden, name = self.lines or not self.shown, f"{self.name}: {text}"
        with tqdm(total=images, desc=name, disable=hidden, unit=" images", leave=False, dynamic_ncols=True) as self.bar:
            yield
        self.bar = None

    def count(self, images: int) -> None:
        """Count images whose attack is finished."""
        if self.bar is not None:
            self.bar.update(images)

    def next_row(self) -> None:
        """Begin with the next row, because the last row is finished or was read from the cache."""
        self.rows += 1

    def finished(self, result: str) -> None:
        """Write the short result of a row to the log."""
        if self.lines:
            self._print(f"{result} ({tqdm.format_interval(self.seconds)})")

    def _print(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)
