"""Counts the images in the passes of an evaluation, and shows the progress by a bar for each attack."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ...protocols import Classifier, Passes, SharesDraws, supports

#: The seconds between two states of a bar in a log, which is no terminal.
LOGGED_EVERY = 30.0


class Progress:
    """Counts the images in the passes of an evaluation, and shows the progress."""

    def __init__(self, name: str = "", shown: bool = False):
        self.name, self.shown = name, shown
        self.images, self.bar = Passes(), None
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time since this object was made."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def row(self, label: str, most: Passes | None) -> Iterator[None]:
        """Within the block, show a bar of the images that are counted; ``most`` is their largest number."""
        options: dict[str, Any] = {"unit": " predictions", "unit_scale": True, "leave": False, "dynamic_ncols": True}
        if not sys.stderr.isatty():
            options |= {"mininterval": LOGGED_EVERY, "delay": LOGGED_EVERY}
        total = None if most is None else most.forwards
        with tqdm(total=total, desc=f"{self.name}: {label}", disable=not self.shown, **options) as self.bar:
            yield
        self.bar = None

    def count(self, images: Passes) -> None:
        """Count images of passes."""
        self.images += images
        if self.bar is not None:
            self.bar.update(images.forwards)

    def say(self, text: str) -> None:
        """Write a line to stderr, with the time so far."""
        if self.shown:
            tqdm.write(f"{self.name}: {text} ({tqdm.format_interval(self.seconds)})", file=sys.stderr)


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
