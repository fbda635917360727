"""Batch sizes that an attack lets its batch shrink to.

Every size has a cost of its own: a convolution library prepares its kernels for it, a compiler may compile again, a
CUDA graph is captured. So a shrinking batch only takes sizes of a fixed list, and images that have fallen fill it up.
To a CPU an image more of a large model, or under many draws, costs more than a new size: there every number is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Sizes per doubling on a CPU, which prepares a size in milliseconds.
PER_DOUBLING = 4
#: Elsewhere: the smallest size, because fewer images take a GPU no less time; and the size from which there are two
#: sizes per doubling, because the arithmetic then takes longer than its launches.
SMALLEST, FINER_FROM = 16, 128


def takes_every_size(device: torch.device) -> bool:
    """Whether a new batch size costs a device next to nothing, as it costs a CPU.

    Args:
        device: where the images are.
    """
    return device.type == "cpu"


def bucket(items: int, device: torch.device, costly: bool = False) -> int:
    """The smallest size of the list that holds so many items.

    Args:
        items: how many are left, at least 1.
        device: where they are; the list is coarser on a GPU.
        costly: whether a step of one item costs a CPU more than a new size.

    Returns:
        On a CPU a power of two times 1, 5/4, 6/4 or 7/4; every number below 8, and of costly items. On a GPU 16, 32,
        64, and from 128 on a power of two times 1 or 3/2.
    """
    if takes_every_size(device):
        if costly or items <= 2 * PER_DOUBLING:
            return items
        return _rounded_up(items, PER_DOUBLING)
    return max(SMALLEST, _rounded_up(items, 2 if items > FINER_FROM else 1))


def repeated_to(index: Tensor, size: int) -> Tensor:
    """An index whose first elements are repeated until it has a size.

    Args:
        index: int64 ``[R]``, at least one element.
        size: at least R.
    """
    return index.repeat(-(-size // len(index)))[:size] if size > len(index) else index


def _rounded_up(items: int, parts: int) -> int:
    """The next power of two, or multiple of the one before it over ``parts``."""
    step = (1 << ((items - 1).bit_length() - 1)) // parts if items > 1 else 1
    return -(-items // step) * step
