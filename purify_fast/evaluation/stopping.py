"""The rule by which an attack stops before it has searched every image: by evidence, never by a constant.

Images are searched in rounds, first those to which earlier attacks came nearest, by the least margin that any attack
reached on the model itself. An image further down this order is less likely to fall. So the images that have withstood
the attack since the last image fell bound how many of the rest may fall: if none of ``w`` images
fell, an image of the rest falls with a probability of at most ``1 - a ** (1 / w)`` at the confidence ``1 - a`` (for
``a = 0.05`` this is the rule of three, ``3 / w``). The rule is applied after each round, so that ``a`` is 0.05
divided by the number of rounds. The attack stops when this bound, times the images that are left, is below a stated
share of all images. The report states the bound.

The order may be wrong for a part of the images, for example where gradients are masked. Therefore some images of each
round are drawn by lot, and an image that no search came nearer to a border, or whose gradients are missing, is no
evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..attacks.ball import philox_key
from ..ops.philox import Stream, philox
from .rows import Row

#: Increase this number whenever a change here lets the same attack search other images; kept rows with an older number
#: are then made again.
REVISION = 1
#: The confidence of the bound on the images that may still fall, over all rounds together.
CONFIDENCE = 0.95
#: An attack has at most ROUNDS rounds, of at least SMALLEST images each, since a smaller batch takes a processor hardly
#: less time.
ROUNDS, SMALLEST = 8, 32
#: Images are ordered by their margin, but a random lot may put an image further forward. The lots are spread over
#: BY_LOT times as many positions as there are images, so that about one image in five of the first round is there by
#: lot.
BY_LOT = 4


def nearest_first(index: Tensor, margins: np.ndarray, first: int, seed: int) -> Tensor:
    """Images in the order in which they are searched.

    Args:
        index: indices of the images, int64 ``[n]``.
        margins: least margin that any attack has reached on each of all images, ``[N]``; infinite without an attack.
        first: the number of the first image in the data set; an image's lot depends on its number there.
        seed: seed of the lots.

    Returns:
        The same images, int64 ``[n]``.
    """
    reached = torch.from_numpy(margins)[index].nan_to_num(nan=math.inf)
    near = index[reached.argsort(stable=True)]
    place = torch.arange(len(near)) / max(1, len(near))
    lots = philox(philox_key(seed, near.device), near + first, 1, stream=Stream.LOTS, distribution="uniform")
    return near[torch.minimum(place, BY_LOT * lots.flatten()).argsort(stable=True)]


class StoppingRule:
    """Decides after each round whether an attack stops.

    Args:
        share: the most images, as a share of all, that may still fall among those left out.
        images: number of images given to the attack.
        total: number of all images, attacked or not.

    Attributes:
        unsearched: number of images that the attack has not searched.
        misses: number of images, counted back from the last searched image, that withstood without a fall between.
    """

    def __init__(self, share: float, images: int, total: int):
        self.allowed, self.unsearched, self.misses = share * total, images, 0
        #: The number of images in a round.
        self.round = max(SMALLEST, math.ceil(images / ROUNDS))
        self._error = (1 - CONFIDENCE) / max(1, math.ceil(images / self.round))

    @property
    def may_hold(self) -> float:
        """The most images, of those not searched, that would fall, at `CONFIDENCE`."""
        if self.misses == 0:
            return float(self.unsearched)
        return self.unsearched * (1 - self._error ** (1 / self.misses))

    def record(self, fell: Sequence[bool], no_evidence: int) -> bool:
        """Record a round.

        Args:
            fell: mask of its images that fell, in order.
            no_evidence: number of withstanding images that are no evidence.

        Returns:
            Whether the attack stops.
        """
        self.unsearched -= len(fell)
        since = next((number for number, has in enumerate(reversed(fell)) if has), len(fell))
        before = self.misses if since == len(fell) else 0
        self.misses = before + max(0, since - no_evidence)
        return self.may_hold <= self.allowed


def notes_of_proofs(rows: Sequence[Row]) -> list[str]:
    """The sentence of a report on the images that a complete search proved robust; none without such a search."""
    own = [row for row in rows if row.is_attack and row.threat is None and row.deployed and not row.transferred]
    proved = [row for row in own if row.proved and row.settings["target"] == "defence"]
    if not proved:
        return []
    most = max(proved, key=lambda row: row.proved / row.n)
    count = most.proved
    return [
        f"{count} of {most.n} images are proved robust within this ball, by a complete search in float64 "
        f"({most.attack}): no attack can lower the number below {100 * count / most.n:.1f} %"
    ]


def notes_of_unsearched(rows: Sequence[Row]) -> list[str]:
    """The sentence of a report on the images that no attack searched; none if all were searched."""
    stopped = [row for row in rows if row.threat is None and row.unsearched]
    if not stopped:
        return []
    points = [100 * row.may_hold / row.n for row in stopped]
    each = "; ".join(
        f"{row.attack}: {row.unsearched} of {row.attacked} images, {held:.2f} points"
        for row, held in zip(stopped, points, strict=True)
    )
    return [
        f"the searches that ended early missed at most {sum(points):.2f} points, at 95 % confidence for each attack. "
        "An attack begins with the images to which earlier attacks came nearest. It stops when so many in a row have "
        f"withstood it that hardly any of the rest can fall. Images that were not searched: {each}. The protocol "
        "strong searches every image"
    ]
