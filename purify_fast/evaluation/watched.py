"""A progress bar over the forward passes of a model under attack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ..protocols import Classifier, SharesDraws, supports


class Meter:
    """Counts images, and shows them by the bar of the row that is being made.

    Args:
        bar: its ``update`` is told of every forward pass; another one may be put in its place.

    Attributes:
        images: how many so far.
    """

    def __init__(self, bar: Any = None):
        self.images, self.bar = 0, bar

    def count(self, images: int) -> None:
        """Count images.

        Args:
            images: how many; below 0 for passes that were only tried.
        """
        self.images += images
        if self.bar is not None:
            self.bar.update(images)


class Watched(nn.Module):
    """A module around any callable, as AutoAttack wants one; counts the images for the progress bar.

    One of these serves a model for a whole evaluation, because a captured step is of one module.

    Args:
        model: the callable.
        meter: is told of every forward pass.
    """

    #: What a captured step need not look at (`purify_fast.speed.dependencies`).
    not_dependencies = frozenset({"meter"})

    def __init__(self, model: Classifier, meter: Meter):
        super().__init__()
        self.model, self.meter = model, meter
        self.training = False

    def train(self, mode: bool = True) -> Watched:
        """Nothing: the model under attack stays in evaluation mode, whatever an attack does to its modes.

        Args:
            mode: is not looked at.
        """
        return self

    def around(self, replace: Callable[[Classifier], Classifier]) -> Watched:
        """The same counter around another model.

        Args:
            replace: makes that model of the one inside.
        """
        return watched(replace(self.model), self.meter)

    def counted(self) -> int:
        """How many images the model was given, each draw of an image counted."""
        return self.meter.images

    def count(self, images: int) -> None:
        """Count images, those of a captured step that is replayed too.

        Args:
            images: how many; below 0 for passes that were only tried.
        """
        self.meter.count(images)

    def forward(self, x: Tensor) -> Tensor:
        self.count(len(x))
        return self.model(x)


class _WatchedDraws(Watched):
    """The same around a model that makes several draws at once."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        self.count(draws * len(x))
        return self.model.draw_logits(x, draws)  # type: ignore[attr-defined]


def watched(model: Classifier, meter: Meter) -> Watched:
    """The model, with every forward pass told to a meter."""
    return (_WatchedDraws if supports(model, SharesDraws) else Watched)(model, meter)


@contextlib.contextmanager
def progress_bar(label: str, shown: bool, total: int | None) -> Iterator[tqdm]:
    """A bar over the forward passes of single images, with their rate and the time left; it disappears at the end."""
    with tqdm(
        total=total, desc=label, unit=" images", unit_scale=True, disable=not shown, leave=False, dynamic_ncols=True
    ) as bar:
        yield bar
