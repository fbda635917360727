"""The tensors of a model, and how many weights it has."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

#: With the dtype "auto", a model with fewer weights in convolutions and linear layers than this computes in float32,
#: because conversions to bfloat16 would take more time than they save.
FEWEST_WEIGHTS = 250_000


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model with all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def matrix_weights(model: nn.Module) -> int:
    """The number of weights in the convolutions and linear layers of a model."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, layers))
