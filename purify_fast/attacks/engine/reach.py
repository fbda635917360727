"""Which rows of a search are given up, because they would not fall even at several times their recent pace.

Most of the time of a strong attack goes into images that it never moves near a border: towards the ninth target class,
or by the last of 5,000 squares. What a search gains per step hardly ever rises again, so that several times its recent
pace says how far it can still come. That is experience and no law: a search that stands still is given up too, although
it might go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

#: Of the attacks by gradients: after which shares of the steps rows are given up, and by how much the pace may still
#: rise. On the models of docs/evaluation.md none of the images is lost so, and only few at a quarter of the steps.
SHARES, TIMES = (0.4, 0.6, 0.8), 8.0
#: Shorter runs are not judged by their pace.
FEWEST_STEPS = 50


class Reach:
    """Watches how far each row is from its border.

    Args:
        checks: after how many steps rows are given up; the pace is that of the last half of the steps before.
        steps: of the whole search.
        times: the pace may rise so many times.
    """

    def __init__(self, checks: Iterable[int], steps: int, times: float):
        self.checks, self.steps, self.times = sorted(set(checks)), steps, times
        #: When the distances were noted for a check, and what they were.
        self._noted: dict[int, tuple[int, Tensor]] = {}
        self._seen = 0

    def due(self, step: int) -> bool:
        """Whether `lost` would note or decide anything; a search that takes short steps need not call it where not.

        Args:
            step: how many steps were taken.
        """
        return any(self._seen < mark <= step for check in self.checks for mark in (check // 2, check))

    def lost(self, step: int, missing: Tensor) -> Tensor | None:
        """Which rows are out of reach; None where nothing is decided.

        Args:
            step: how many steps were taken; every call's is larger than the last one's.
            missing: how far each row is from its border, in the unit of the loss or distance, ``[R]``; at most 0 across
                it, and smaller with every call, or as it was.

        Returns:
            Bool ``[R]``. A distance that is not a number, or infinite, is never out of reach.
        """
        lost = None
        for check in self.checks:
            if self._seen < check // 2 <= step:
                self._noted[check] = step, missing
            if self._seen < check <= step < self.steps and check in self._noted:
                noted_at, before = self._noted.pop(check)
                if step > noted_at:
                    pace = (before - missing) / (step - noted_at)
                    lost = missing.isfinite() & (missing > self.times * pace * (self.steps - step))
        self._seen = step
        return lost

    def take(self, index: Tensor) -> None:
        """Keep some of the rows.

        Args:
            index: which, int64.
        """
        self._noted = {check: (at, missing[index]) for check, (at, missing) in self._noted.items()}


def reach_of_steps(steps: int) -> Reach | None:
    """For an attack by gradients; None where the run is too short.

    Args:
        steps: of a run.
    """
    return Reach([round(share * steps) for share in SHARES], steps, TIMES) if steps >= FEWEST_STEPS else None


def some_of(lost: Tensor | None) -> Tensor | None:
    """Which rows are out of reach, where any is; waits for the device.

    Args:
        lost: of `Reach.lost`.

    Returns:
        Bool ``[R]``, or None.
    """
    return lost if lost is not None and bool(lost.any()) else None


def border(loss: str) -> float:
    """The value that a loss has at least where an image is misclassified, of a targeted loss as the target.

    Args:
        loss: a name of `purify_fast.attacks.LOSSES` or `TARGETED`.
    """
    # the true class has less than half of the probability there; all other losses are margins, up to a factor
    return math.log(2) if loss == "ce" else 0.0
