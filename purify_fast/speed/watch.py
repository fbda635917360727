"""Look at the weights of a model: how many there are, and whether they have changed since the last look."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: With the dtype "auto", a model with fewer weights in convolutions and linear layers than this computes in float32,
#: because conversions to bfloat16 would take more time than they save.
FEWEST_WEIGHTS = 250_000


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model with all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def can_read_values(device: torch.device) -> bool:
    """Tell whether the host may read values of tensors now: not while a step is traced, compiled or captured."""
    if torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def matrix_weights(model: nn.Module) -> int:
    """The number of weights in the convolutions and linear layers of a model."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, layers))


class Watch:
    """Remembers the tensors of a model, and tells whether PyTorch has counted a write to them."""

    def __init__(self) -> None:
        self._stamps: list[tuple[int, int, int]] | None = None
        # An id is unique only while its tensor exists.
        self._tensors: list[Tensor] = []

    def __deepcopy__(self, memo: object) -> Watch:
        # A copy of the model has other tensors with the same values.
        return Watch()

    def changed(self, tensors: list[Tensor]) -> bool:
        """Tell whether tensors, or their counts of writes, differ from the last call; False at the first call."""
        stamps = [(id(one), one.data_ptr(), -1 if one.is_inference() else one._version) for one in tensors]
        before, self._stamps, self._tensors = self._stamps, stamps, tensors
        return before is not None and stamps != before
