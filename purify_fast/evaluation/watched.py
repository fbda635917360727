"""A progress bar over the forward passes of a model under attack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ..protocols import Classifier, SharesDraws, supports


class Watched(nn.Module):
    """A module around any callable, as AutoAttack wants one; counts the images for the progress bar.

    Args:
        model: the callable.
        bar: its ``update`` is told of every forward pass.
    """

    #: What a captured step need not look at (`purify_fast.speed.dependencies`).
    not_dependencies = frozenset({"bar", "images"})

    def __init__(self, model: Classifier, bar: Any):
        super().__init__()
        self.model, self.bar = model, bar
        self.training = False
        self.images = 0

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
        return watched(replace(self.model), self.bar)

    def counted(self) -> int:
        """How many images the model was given, each draw of an image counted."""
        return self.images

    def count(self, images: int) -> None:
        """Count images, those of a captured step that is replayed too.

        Args:
            images: how many; below 0 for passes that were only tried.
        """
        self.images += images
        self.bar.update(images)

    def forward(self, x: Tensor) -> Tensor:
        self.count(len(x))
        return self.model(x)


class _WatchedDraws(Watched):
    """The same around a model that makes several draws at once."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        self.count(draws * len(x))
        return self.model.draw_logits(x, draws)  # type: ignore[attr-defined]


def watched(model: Classifier, bar: Any) -> Watched:
    """The model, with every forward pass shown by the bar."""
    return (_WatchedDraws if supports(model, SharesDraws) else Watched)(model, bar)


@contextlib.contextmanager
def progress_bar(label: str, shown: bool, total: int | None) -> Iterator[tqdm]:
    """A bar over the forward passes of single images, with their rate and the time left; it disappears at the end."""
    with tqdm(
        total=total, desc=label, unit=" images", unit_scale=True, disable=not shown, leave=False, dynamic_ncols=True
    ) as bar:
        yield bar
