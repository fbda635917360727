"""Shows the progress of an evaluation, by a bar on a terminal or by lines in a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ...protocols import Classifier, Passes, SharesDraws, supports

#: The shortest time between two lines of a log, and the time of the first line, in seconds.
LINE_EVERY, FIRST_LINE = 30.0, 10.0


class Progress:
    """Counts the images in the passes of an evaluation, and shows the progress.

    ``costs`` are upper limits of these counts for each row, or None. The time is over ``until`` a value of
    `time.monotonic`.
    """

    def __init__(
        self,
        name: str = "",
        shown: bool = False,
        costs: Sequence[Passes | None] = (),
        until: float = math.inf,
    ):
        self.name, self.shown, self.until = name, shown, until
        self.lines = shown and not sys.stderr.isatty()
        self.costs = list(costs)
        self.rows, self.images, self.in_row = 0, Passes(), 0
        self.label, self.bar = "", None
        self.began = time.monotonic()
        self.last_line = self.began + min(FIRST_LINE, LINE_EVERY) - LINE_EVERY

    @property
    def seconds(self) -> float:
        """The time since this object was made."""
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """The number of images per second in the forward passes so far."""
        return self.images.forwards / max(self.seconds, 1e-9)

    def plan(self, images: int, expected: float | None = None) -> None:
        """Print what the remaining rows cost at most, and the seconds that they are ``expected`` to take."""
        costs = self.costs[self.rows :]
        known = [cost for cost in costs if cost is not None]
        most = sum(known, Passes())
        text = (
            f"plan: {len(costs)} attacks on {images} images, at most {most.forwards / images:,.0f} forward passes and "
        )
        text += f"{most.gradients / images:,.0f} gradients for each"
        text += f", and attacks of unknown cost {len(costs) - len(known)}" if len(known) < len(costs) else ""
        if self.shown:
            self._print(text + ("" if expected is None else f"; about {tqdm.format_interval(expected)}"))

    @contextlib.contextmanager
    def row(self, label: str, most: Passes | None) -> Iterator[None]:
        """A context in which images are counted for a row."""
        self.in_row = 0
        place = f"{self.rows + 1} of {max(len(self.costs), self.rows + 1)}"
        self.label = f"{place}, {label}"
        options: dict[str, Any] = {"unit": " predictions", "unit_scale": True, "leave": False, "dynamic_ncols": True}
        hidden = self.lines or not self.shown
        total = None if most is None else most.forwards
        with tqdm(total=total, desc=f"{self.name}: {label} ({place})", disable=hidden, **options) as self.bar:
            yield
        self.bar = None

    def next_row(self) -> None:
        """Begin with the next row, because the last row is finished or was read from the cache."""
        self.rows, self.in_row = self.rows + 1, 0

    def count(self, images: Passes) -> None:
        """Count images of passes, and write a line to the log if the last line is old."""
        self.images += images
        self.in_row += images.forwards
        if self.bar is None:
            return
        self.bar.set_postfix_str(self.left(), refresh=False)
        self.bar.update(images.forwards)
        if self.lines and time.monotonic() - self.last_line >= LINE_EVERY:
            self._print(f"row {self.label}: {self.rate:,.0f} predictions/s, {self.left()}")

    def finished(self, result: str) -> None:
        """Write the short result of a row to the log."""
        if self.lines:
            self._print(f"{result} ({tqdm.format_interval(self.seconds)}, {self.left()})")

    def _print(self, text: str) -> None:
        self.last_line = time.monotonic()
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def left(self) -> str:
        """The longest time that the remaining rows may take, in words."""
        costs = self.costs[self.rows :]
        if not costs:
            return "the last row"
        known = [cost.forwards for cost in costs if cost is not None]
        if len(known) < len(costs) or not self.images.forwards:
            return "time left not known"
        seconds = (sum(known) - min(self.in_row, known[0])) / self.rate
        seconds = min(seconds, max(0, self.until - time.monotonic()))
        return f"{tqdm.format_interval(seconds)} left at most"


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
