"""The model's own judgement of points, which decides whether an image has fallen; and the sizes of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...._compiler import section
from ....attacks.attacked_model import logits_of
from ....attacks.objective import Objective
from ....protocols import Classifier
from ....speed.watch import FEWEST_WEIGHTS, matrix_weights

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
