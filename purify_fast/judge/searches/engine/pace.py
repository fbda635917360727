"""The progress per step ("pace") of rows, by which rows that would not reach a decision boundary are given up.

The rule is empirical: a pace hardly ever rises, but a row without progress for a while might succeed later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Attacks with gradients may give rows up after these SHARES of the steps. A row is given up if it would not reach its
#: border even at TIMES its recent pace. On the models of docs/evaluation.md this rule misses no adversarial image. A
#: check after a quarter of the steps would miss a few.
SHARES, TIMES = (0.4, 0.6, 0.8), 8.0
#: A run with fewer steps never gives rows up.
FEWEST_STEPS = 50
#: The first EARLY_SHARE of the steps are the early steps. The gain of a row is the distance by which it came nearer to
#: its border after its early steps. A row is given up at the end of its early steps if its distance to the border is
#: more than GAINS times the largest gain of earlier rows of the same attack. The rule is used once FEWEST_GAINS rows
#: were searched.
EARLY_SHARE, GAINS, FEWEST_GAINS = 0.15, 2.0, 16


@dataclass
class Gains:
    """Records by how much the rows of an attack came nearer to their borders after their early steps (their gains)."""

    largest: float = 0.0
    rows: int = 0

    def see(self, gained: Tensor) -> None:
        """Update the largest gain with the gains of some rows, ``[R]``. This waits for the device."""
        if len(gained):
            self.largest = max(self.largest, float(gained.nan_to_num(0.0, 0.0, 0.0).amax()))

    def out_of_reach(self, missing: Tensor) -> Tensor | None:
        """Tell which rows exceed `GAINS` times the largest gain, bool ``[R]``; None while too few gains are known."""
        if self.rows < FEWEST_GAINS:
            return None
        return missing.isfinite() & (missing > GAINS * self.largest)


class PaceMonitor:
    """Watches the distance of each row from its border, and decides at the steps ``checks`` which rows are given up.

    At step n, the pace is measured from step n / 2 on, and is assumed to rise by at most the factor ``times``.
    """

    def __init__(self, checks: Iterable[int], steps: int, times: float, gains: Gains | None = None):
        self.checks, self.steps, self.times, self.gains = sorted(set(checks)), steps, times, gains
        #: The step after which gains are measured, and the distance of each row from its border at that step, ``[R]``.
        self.early_step, self.early = round(EARLY_SHARE * steps), torch.tensor(torch.nan, device="cpu")
        #: A dict from the step of a check to the earlier step at which distances were noted, and these distances.
        self.notes: dict[int, tuple[int, Tensor]] = {}
        #: True for rows whose pace was above 0 at the last check, and for all rows at the end of the early steps.
        self.came_nearer = torch.tensor(False, device="cpu")
        self.last_step = 0

    def due(self, step: int) -> bool:
        """Return True if `lost` has work at this step: to note distances, or to measure the pace."""
        return any(self.last_step < mark <= step for check in self.checks for mark in (check // 2, check))

    def lost(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are out of reach of their borders, bool ``[R]``; None if nothing is decided at this step."""
        lost = self._beyond_gains(step, missing)
        for check in self.checks:
            if self.last_step < check // 2 <= step:
                self.notes[check] = step, missing
            if self.last_step < check <= step < self.steps and check in self.notes:
                noted_at, before = self.notes.pop(check)
                if step > noted_at:
                    pace = (before - missing) / (step - noted_at)
                    beyond = missing.isfinite() & (missing > self.times * pace * (self.steps - step))
                    lost = beyond if lost is None else lost | beyond
                    self.came_nearer = pace > 0
        self.last_step = step
        return lost

    def _beyond_gains(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are given up because of earlier rows' gains; after the early steps, record the gains."""
        if self.gains is None:
            return None
        if self.last_step < self.early_step <= step:
            self.early, self.came_nearer = missing, torch.ones_like(missing, dtype=torch.bool)
            return self.gains.out_of_reach(missing)
        if step > self.early_step:
            self.gains.see(self.early - missing)
            if self.last_step < self.checks[0] <= step:
                self.gains.rows += len(missing)
        return None

    def take(self, index: Tensor) -> PaceMonitor:
        """Continue with some of the rows, selected by an int64 index."""
        self.early = self.early[index] if self.early.dim() else self.early
        self.notes = {check: (at, missing[index]) for check, (at, missing) in self.notes.items()}
        return self


def some_of(lost: Tensor | None) -> Tensor | None:
    """Return ``lost``, bool ``[R]``, or None if no element is True. This waits for the device."""
    return lost if lost is not None and bool(lost.any()) else None
