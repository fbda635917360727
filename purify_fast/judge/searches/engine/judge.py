"""The model's own judgement of points, which decides whether an image has fallen; and the sizes of batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...._compiler import section
from ....attacks.attacked_model import logits_of
from ....attacks.objective import Objective
from ....protocols import Classifier
from ....speed.weights import FEWEST_WEIGHTS, matrix_weights

#: From this number of draws on, one more row takes a CPU longer than a change of the batch size.
MANY_DRAWS = 4
#: The number of batch sizes per doubling on a CPU, which prepares for a new size in milliseconds.
PER_DOUBLING = 4
#: SMALLEST: the smallest batch size on a GPU, because a smaller batch takes the same time. FINER_FROM: from this size
#: on there are two sizes per doubling, because the arithmetic then takes longer than the launches of kernels.
SMALLEST, FINER_FROM = 16, 128


def takes_every_size(device: torch.device) -> bool:
    """Return True if a device prepares for a new batch size in almost no time, as a CPU does."""
    return device.type == "cpu"


def bucket(items: int, device: torch.device, costly: bool = False) -> int:
    """The smallest allowed batch size that holds ``items`` items.

    On a CPU every size below 8 or with ``costly`` is allowed, and else the powers of two times 1, 5/4, 6/4 and 7/4. On
    a GPU the allowed sizes are 16, 32, 64, and from 128 on the powers of two times 1 and 3/2.
    """
    if takes_every_size(device):
        return items if costly or items <= 2 * PER_DOUBLING else _rounded_up(items, PER_DOUBLING)
    return max(SMALLEST, _rounded_up(items, 2 if items > FINER_FROM else 1))


def _rounded_up(items: int, parts: int) -> int:
    """Round ``items`` up to a multiple of p / ``parts``, where p is the largest power of two below ``items``."""
    step = (1 << ((items - 1).bit_length() - 1)) // parts if items > 1 else 1
    return -(-items // step) * step


def repeated_to(index: Tensor, size: int) -> Tensor:
    """Extend an index to ``size`` elements by repeating its first elements; the index must not be empty."""
    return index.repeat(-(-size // len(index)))[:size] if size > len(index) else index


def has_fallen(share: Tensor, enough: float = 1.0) -> Tensor:
    """Tell which images have fallen, bool ``[B]``: those whose share of misclassified draws is at least ``enough``."""
    return share >= enough - 1e-6


@dataclass(frozen=True)
class Judge:
    """Confirms a search's claims: the share ``enough`` of fresh ``draws`` of the model itself must be misclassified."""

    model: Classifier
    draws: int = 1
    max_forward_batch: int | None = None
    apart: bool = False
    enough: float = 1.0

    def shares(self, x: Tensor, y: Tensor) -> Tensor:
        """The share of fresh draws that misclassify each image, ``[B]``."""
        if len(x) == 0:
            return torch.zeros_like(y, dtype=torch.float32)
        objective, count = Objective(self.model, "margin", self.draws, self.max_forward_batch, apart=self.apart), len(x)
        if self.draws == 1 and not takes_every_size(x.device):
            rows = repeated_to(torch.arange(count, device=x.device), bucket(count, x.device))
            x, y = x[rows], y[rows]
        with section("judge"):
            return objective.score(x, y)[0, :count]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of one draw for each image, ``[B, classes]``."""
        return torch.cat([logits_of(self.model, part) for part in x.split(self.max_forward_batch or max(1, len(x)))])

    def is_costly(self) -> bool:
        """Return True if one step of one image takes longer on a CPU than the change to another batch size."""
        large = isinstance(self.model, nn.Module) and matrix_weights(self.model) >= FEWEST_WEIGHTS
        return large or self.draws >= MANY_DRAWS


# -- pace --------------------------------------------------------------------------------------------------------------

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
