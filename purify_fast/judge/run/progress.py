"""Shows the progress of an evaluation, by a bar on a terminal or by lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ...protocols import Classifier, Passes, SharesDraws, supports
from ..request.deadline import Deadline

#: The shortest time between two lines of a log, and the time of the first line, in seconds.
LINE_EVERY, FIRST_LINE = 30.0, 10.0


class Progress:
    """Counts the images in the passes of an evaluation, and shows the progress.

    ``total`` is the number of rows. Each pass of a counted model asks for the ``deadline``.
    """

    def __init__(self, name: str = "", shown: bool = False, total: int = 0, deadline: Deadline | None = None):
        self.name, self.shown, self.total = name, shown, total
        self.deadline = Deadline() if deadline is None else deadline
        self.lines = shown and not sys.stderr.isatty()
        self.rows, self.images, self.in_row = 0, Passes(), 0
        self.label, self.bar = "", None
        self.began = self.row_began = time.monotonic()
        self.last_line = self.began + min(FIRST_LINE, LINE_EVERY) - LINE_EVERY

    @property
    def seconds(self) -> float:
        """The time since this object was made."""
        return time.monotonic() - self.began

    def plan(self, images: int) -> None:
        """Print the number of attacks; nothing predicts how long their searches take."""
        if self.shown:
            self._print(f"plan: {self.total - self.rows} attacks on {images} images")

    @contextlib.contextmanager
    def row(self, label: str, images: int | None = None) -> Iterator[None]:
        """A context in which passes are counted for a row, which attacks a number of images."""
        self.in_row, self.row_began = 0, time.monotonic()
        place = f"{self.rows + 1} of {max(self.total, self.rows + 1)}"
        self.label = f"{place}, {label}"
        options: dict[str, Any] = {"unit": " images", "leave": False, "dynamic_ncols": True, "miniters": 0}
        hidden = self.lines or not self.shown
        try:
            with tqdm(total=images, desc=f"{self.name}: {label} ({place})", disable=hidden, **options) as self.bar:
                yield
        finally:
            self.bar = None

    def reach(self, images: int) -> None:
        """Show that the attack of the row is done with some further images."""
        assert self.bar is not None
        self.bar.update(images)

    def count(self, images: Passes) -> None:
        """Ask for the time, count images of passes, and write a line to the log if the last line is old."""
        if images.forwards >= 0:
            self.deadline.ask(images)
        self.images += images
        self.in_row += images.forwards
        if self.bar is None or not self.shown:
            return
        rate = self.in_row / max(time.monotonic() - self.row_began, 1e-9)
        pace = f"{self.in_row:,} predictions, {rate:,.0f} predictions/s"
        self.bar.set_postfix_str(pace, refresh=False)
        self.bar.update(0)
        if self.lines and time.monotonic() - self.last_line >= LINE_EVERY:
            self._print(f"row {self.label}: {pace}")

    def finished(self, result: str) -> None:
        """Write the short result of a row to the log."""
        if self.lines:
            self._print(f"{result} ({tqdm.format_interval(self.seconds)})")

    def _print(self, text: str) -> None:
        self.last_line = time.monotonic()
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)


class CountedModel(nn.Module):
    """A module that wraps any callable, and counts the images of its forward passes. AutoAttack requires a module.

    There is a single such object for each model, because a CUDA graph belongs to the module of its capture.
    """

    #: Changes of these need no new CUDA graph (`purify_fast.model_state`).
    not_dependencies = frozenset({"progress"})

    def __init__(self, model: Classifier, progress: Progress):
        super().__init__()
        self.model, self.progress = model, progress
        self.training = False

    def train(self, mode: bool = True) -> CountedModel:
        """Do nothing, so that an attack cannot change the model's evaluation mode."""
        return self

    def around(self, replace: Callable[[Classifier], Classifier]) -> CountedModel:
        """Return a new wrapper, which adds to the same count; its model is ``replace`` of this wrapper's model."""
        return counted_model(replace(self.model), self.progress)

    def counted(self) -> Passes:
        """The counts so far; each draw of an image counts as an image."""
        return self.progress.images

    def count(self, images: Passes) -> None:
        """Add to the counts, also when a CUDA graph is replayed; negative numbers take back trial calls."""
        self.progress.count(images)

    def forward(self, x: Tensor) -> Tensor:
        self.count(Passes(len(x), len(x) * x.requires_grad))
        return self.model(x)


class _CountedDraws(CountedModel):
    """A counter around a model with ``draw_logits``, which makes several draws together."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        self.count(Passes(len(x), len(x) * x.requires_grad) * draws)
        return self.model.draw_logits(x, draws)  # type: ignore[attr-defined]


def counted_model(model: Classifier, progress: Progress) -> CountedModel:
    """Wrap a model in a module that counts the images of its forward passes."""
    return (_CountedDraws if supports(model, SharesDraws) else CountedModel)(model, progress)
