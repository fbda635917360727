"""The random stream of a call: the given seed and ids, or new ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import check_stream


def default_stream(
    seed: Tensor | None, sample_ids: Tensor | None, batch: int, **others: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace a missing seed by a new one from PyTorch's generator, and missing ids by 0 to B - 1; check given ones."""
    device = next(iter(others.values())).device
    if seed is None:
        seed = torch.randint(2**62, (1,), device=device)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    check_stream(seed, sample_ids, batch, **others)
    return seed, sample_ids
