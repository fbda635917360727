"""The weights of a model: their number, and copies of their values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: A model with fewer weights in convolutions and linear layers than this is attacked itself in float32, because a copy
#: would take more time than it saves.
FEWEST_WEIGHTS = 250_000
#: The layers whose weights may be in channels_last.
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model with all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def matrix_weights(model: nn.Module) -> int:
    """The number of weights in the convolutions and linear layers of a model."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, layers))


@torch.no_grad()
def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first tensor of each pair the second. On CUDA, all of a dtype and a layout take few launches.

    One tensor of another layout than its source would put all others of its group on PyTorch's slow path.
    """
    groups = defaultdict[Any, list[tuple[Tensor, Tensor]]](list)
    for target, source in pairs:
        groups[target.dtype, source.dtype, target.stride() == source.stride()].append((target, source))
    for group in groups.values():
        torch._foreach_copy_([target for target, _ in group], [source for _, source in group])
