"""Progress of an evaluation: a bar on a terminal, lines in a log; images per second and the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ..protocols import Classifier, SharesDraws, supports

#: The shortest time between two lines of a log, in seconds.
LINE_EVERY = 30.0


class Progress:
    """The progress of an evaluation: counts the images that go through the model.

    Args:
        name: name of the model.
        shown: whether to show anything.
        costs: for the probes and then for each row in order, the most forward passes of single images; None if
            unknown.
    """

    def __init__(self, name: str = "", shown: bool = False, costs: Sequence[int | None] = ()):
        self.name, self.shown = name, shown
        self.lines = shown and not sys.stderr.isatty()
        self.costs = list(costs)
        self.rows, self.images, self.in_row = 0, 0, 0
        self.label, self.bar = "", None
        self.began = self.last_line = time.monotonic()

    @property
    def rate(self) -> float:
        """Images per second through the model so far."""
        return self.images / max(time.monotonic() - self.began, 1e-9)

    @contextlib.contextmanager
    def row(self, label: str, total: int | None) -> Iterator[None]:
        """Within the block, the images are counted for a row.

        Args:
            label: label of the row.
            total: the most forward passes of single images; None if unknown.
        """
        self.in_row = 0
        place = f"{self.rows + 1} of {max(len(self.costs), self.rows + 1)}"
        self.label = f"{place}, {label}"
        options: dict[str, Any] = {"unit": " images", "unit_scale": True, "leave": False, "dynamic_ncols": True}
        hidden = self.lines or not self.shown
        with tqdm(total=total, desc=f"{self.name}: {label} ({place})", disable=hidden, **options) as self.bar:
            yield
        self.bar = None

    def next_row(self) -> None:
        """Go to the next row: the row before is finished, or was read from an earlier run."""
        self.rows, self.in_row = self.rows + 1, 0

    def count(self, images: int) -> None:
        """Count images that went through the model; a log gets a line now and then.

        Args:
            images: number of images; below 0 for passes that were only tried.
        """
        self.images += images
        self.in_row += images
        if self.bar is None:
            return
        self.bar.update(images)
        if self.lines and time.monotonic() - self.last_line >= LINE_EVERY:
            self._print(f"row {self.label}: {self.rate:,.0f} images/s, {self.left()}")

    def finished(self, result: str) -> None:
        """Write the short result of a row to the log."""
        if self.lines:
            self._print(f"{result} ({tqdm.format_interval(time.monotonic() - self.began)}, {self.left()})")

    def _print(self, text: str) -> None:
        self.last_line = time.monotonic()
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def left(self) -> str:
        """The time that the rows still to be made take at most, in words."""
        costs = self.costs[self.rows :]
        if not costs:
            return "the last row"
        if None in costs or not self.images:
            return "time left not known"
        passes = sum(cost or 0 for cost in costs) - min(costs[0] or 0, self.in_row)
        return f"{tqdm.format_interval(passes / self.rate)} left at most"


class CountedModel(nn.Module):
    """A module around any callable that counts the images of its forward passes. AutoAttack needs a module.

    The same object is used for a model during a whole evaluation, because a captured step belongs to one module.

    Args:
        model: the callable.
        progress: counts the images.
    """

    #: Attributes that do not change the computation, so that a captured step ignores them (`purify_fast.model_state`).
    not_dependencies = frozenset({"progress"})

    def __init__(self, model: Classifier, progress: Progress):
        super().__init__()
        self.model, self.progress = model, progress
        self.training = False

    def train(self, mode: bool = True) -> CountedModel:
        """Do nothing: the model under attack stays in evaluation mode, whatever an attack asks for.

        Args:
            mode: ignored.
        """
        return self

    def around(self, replace: Callable[[Classifier], Classifier]) -> CountedModel:
        """The same counter around another model, which ``replace`` makes from the inner model."""
        return counted_model(replace(self.model), self.progress)

    def counted(self) -> int:
        """The number of images counted; each draw of an image counts."""
        return self.progress.images

    def count(self, images: int) -> None:
        """Count images, also those of replayed captured steps; below 0 for passes that were only tried."""
        self.progress.count(images)

    def forward(self, x: Tensor) -> Tensor:
        self.count(len(x))
        return self.model(x)


class _CountedDraws(CountedModel):
    """The same counter around a model that makes several draws at once."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        self.count(draws * len(x))
        return self.model.draw_logits(x, draws)  # type: ignore[attr-defined]


def counted_model(model: Classifier, progress: Progress) -> CountedModel:
    """The model, with the images of every forward pass counted."""
    return (_CountedDraws if supports(model, SharesDraws) else CountedModel)(model, progress)
