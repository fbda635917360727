"""The weights of a model: their number and their copies."""

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
def copied(tensors: Iterable[Tensor], **how: Any) -> list[Tensor]:
    """Copy tensors to new memory, with other arguments of `torch.empty_like` if given; on CUDA in few launches."""
    old = list(tensors)
    new = [torch.empty_like(one, **how) for one in old]
    copy_all(new, old)
    return new


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors into others. On CUDA, all of a dtype are copied in a single launch."""
    groups = defaultdict[Any, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        into, of = groups[target.dtype, source.dtype]
        into.append(target)
        of.append(source)
    for into, of in groups.values():
        torch._foreach_copy_(into, of)
