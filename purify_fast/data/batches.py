"""Which images a step trains on: a function of (seed, epoch), so that a run can resume anywhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def batches(
    n: int,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """One epoch's batches, as indices.

    Args:
        n: images in the data set.
        batch_size: images per step over all ranks, a multiple of ``world``.
        seed: at least 0; the permutation is a function of the seed and the epoch, the same on every rank.
        epoch: at least 0.
        drop_last: whether an incomplete last batch is left out; if not, its shares may differ by one, or be empty.
        rank: the number of this process. Its share is every world-th index of the whole batch, from the rank-th on, so
            that each part of a batch that is laid out in parts is divided alike.
        world: how many processes there are.
        device: where the indices are wanted; None for the CPU.

    Returns:
        int64 tensors ``[batch_size / world]`` on ``device``; step k's batch is element k.

    Raises:
        ValueError: a count below 1, ``n < batch_size`` with ``drop_last``, a batch that ``world`` does not divide.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0 .. world - 1 = {world - 1}, got {rank}")
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the {world} processes")
    if drop_last and n < batch_size:
        raise ValueError(f"batch_size {batch_size} is more than the {n} images: an epoch would have no step")
    # RandomState, since numpy promises never to change its stream
    state = np.random.RandomState([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch])
    order = torch.from_numpy(state.permutation(n)).to(device)
    last = n - n % batch_size if drop_last else n
    parts = [order[first : min(first + batch_size, last)] for first in range(0, last, batch_size)]
    return [part[rank::world] for part in parts]
