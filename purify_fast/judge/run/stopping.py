"""The rule by which an attack stops before it has reached every image, because few of the remaining images could fall.

Images are attacked in rounds, first the images with the smallest margins on the model itself. A later image is less
likely to fall, so a series of images that withstand the attack gives a bound for the unsearched images. If the last
``w`` images all withstood, each unsearched image falls with a probability of at most ``1 - a ** (1 / w)`` at the
confidence ``1 - a`` (for ``a = 0.05`` this is the rule of three, ``3 / w``). Because the rule is applied after each
round, ``a`` is 0.05 divided by the number of rounds. The attack stops when this probability, times the number of
unsearched images, is at most a given share of all images. The report states this bound.

A slow attack gets only the images with the smallest margins (`NearestRule`): all that are as near as a search has come
nearer to any image, and at least GROUP.

The order may be wrong, for example if gradients are masked, so some images of each round are drawn at random. An image
that withstood does not count for ``w`` if its search came no nearer to the decision boundary, or had no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...ops.philox import Stream, philox, philox_key

#: Increase this number whenever the same attack reaches other images: cached rows are then made again.
REVISION = 1
#: The confidence of the bound on the images that may still fall, over all rounds together.
CONFIDENCE = 0.95
#: The most rounds of an attack, and the fewest images of a round: fewer take about the same time.
ROUNDS, SMALLEST = 8, 32
#: Images are ordered by their margin, but a random position may put an image further forward. The random positions are
#: uniform between 0 and RANDOM_SHARE times the number of images. With this value, about a fifth of the images in the
#: first round are there because of their random positions.
RANDOM_SHARE = 4
#: The number of images in a group of the nearest images, and the fewest in the first.
GROUP = 5


def by_margin(index: Tensor, margins: np.ndarray) -> Tensor:
    """Sort the indices of images, int64 ``[n]``, by the images' margins, ``[N]``; images without a margin come last."""
    reached = torch.from_numpy(margins)[index].nan_to_num(nan=math.inf)
    return index[reached.argsort(stable=True)]


def rounds_of(images: int, size: int) -> list[int]:
    """The sizes of the rounds in which a number of images is attacked."""
    return [min(size, images - begin) for begin in range(0, images, size)]


def nearest_first(index: Tensor, margins: np.ndarray, seed: int) -> Tensor:
    """Sort images into the order in which they are attacked."""
    near = by_margin(index, margins)
    place = torch.arange(len(near), device="cpu") / max(1, len(near))
    lots = philox(philox_key(seed, near.device), near, 1, stream=Stream.LOTS, distribution="uniform")
    return near[torch.minimum(place, RANDOM_SHARE * lots.flatten()).argsort(stable=True)]


class StoppingRule:
    """Decides after each round whether an attack stops.

    Args:
        share: the largest number of unsearched images that may still fall when the attack stops, as a share of all
            images.
        images: number of images that the attack got.
        total: number of all images, including those that the attack did not get.

    Attributes:
        unsearched: number of images that the attack has not reached.
        misses: number of images that withstood since the last image that fell; only images whose search could have
            succeeded count.
    """

    def __init__(self, share: float, images: int, total: int):
        self.allowed, self.unsearched, self.misses = share * total, images, 0
        round_size = max(SMALLEST, math.ceil(images / ROUNDS))
        #: The number of images in each round.
        self.rounds = rounds_of(images, round_size)
        self._error = (1 - CONFIDENCE) / max(1, len(self.rounds))

    @property
    def may_hold(self) -> float:
        """The largest number of unsearched images that would fall, with the confidence `CONFIDENCE`."""
        if self.misses == 0:
            return float(self.unsearched)
        return self.unsearched * (1 - self._error ** (1 / self.misses))

    def record(self, leads: Sequence[float], no_evidence: int) -> bool:
        """Record a round: the margins of its images after the attack, and how many searches are no evidence."""
        fell = [not lead > 0 for lead in leads]
        self.unsearched -= len(fell)
        since = next((number for number, has in enumerate(reversed(fell)) if has), len(fell))
        before = self.misses if since == len(fell) else 0
        self.misses = before + max(0, since - no_evidence)
        return self.may_hold <= self.allowed


class NearestRule:
    """Decides after each group of the nearest images whether the next group is attacked.

    Args:
        margins: the margins of the images before the attack, in ascending order.
        gain: the largest amount by which earlier searches have lowered the margin of an image after the first attack.

    Attributes:
        gain: the same, also of this attack; an image that falls has gained its whole margin.
        rounds: the number of images in each group. The first has all images whose margin is at most the gain.
    """

    may_hold = 0.0

    def __init__(self, margins: Sequence[float], gain: float = 0.0):
        # An image that no attack has reached comes last, and its distance is unknown.
        self.margins = [math.inf if math.isnan(margin) else margin for margin in margins]
        self.searched, self.gain = 0, gain
        first = min(len(margins), max(GROUP, sum(margin <= gain for margin in self.margins)))
        self.rounds = [first, *rounds_of(len(margins) - first, GROUP)]

    @property
    def unsearched(self) -> int:
        return len(self.margins) - self.searched

    def record(self, leads: Sequence[float], no_evidence: int) -> bool:
        """Record a group, see `StoppingRule.record`."""
        before = self.margins[self.searched : self.searched + len(leads)]
        self.searched += len(leads)
        gains = [was - max(lead, 0.0) if lead > 0 else was for was, lead in zip(before, leads, strict=True)]
        self.gain = max(self.gain, *gains)
        return self.unsearched > 0 and not self.margins[self.searched] <= self.gain
