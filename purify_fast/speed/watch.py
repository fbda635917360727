"""Look at the weights of a model: how many there are, and whether they have changed since the last look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._tensors import in_memory_order

#: The number of neighboring words whose sum is remembered for each block of a tensor.
BLOCK = 512
#: Tensors with at most this many numbers are copied instead, all together.
SMALL = 4096
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
    """Remembers the weights of a model, and tells whether they have changed.

    PyTorch's count of writes misses those through ``p.data``. So the values are compared too: by sums of their bits
    over blocks of 4 kB on a CPU, else by each tensor's sum and norm. A change that keeps all of these is not seen.
    """

    def __init__(self) -> None:
        self._stamps: list[tuple[int, int, int]] | None = None
        self._marks: list[Tensor] = []
        # An id is unique only while its tensor exists.
        self._tensors: list[Tensor] = []

    def __deepcopy__(self, memo: object) -> Watch:
        # A copy of the model has other tensors with the same values.
        return Watch()

    @property
    def begun(self) -> bool:
        """True after the first call of `changed`."""
        return self._stamps is not None

    def changed(self, tensors: list[Tensor], values: bool = True) -> bool:
        """Tell whether tensors, with ``values`` also their values, differ from the last call; True at first."""
        stamps = [(id(one), one.data_ptr(), -1 if one.is_inference() else one._version) for one in tensors]
        counted, self._stamps = stamps != self._stamps, stamps
        if counted or values:
            before, self._marks, self._tensors = self._marks, _marks(tensors) if values else [], tensors
            if not counted and before:
                # Equal stamps mean equal shapes, so there are as many marks as before.
                return not all(map(torch.equal, before, self._marks))
        return counted


@torch.no_grad()
def _marks(tensors: list[Tensor]) -> list[Tensor]:
    """Return numbers that change with the values of tensors."""
    if tensors and tensors[0].device.type != "cpu":
        wide = [one.detach().float() for one in tensors]
        return [torch.stack([*torch._foreach_norm(wide), *(one.sum() for one in wide)])]
    small, sums = defaultdict[torch.dtype, list[Tensor]](list), list[Tensor]()
    for one in tensors:
        flat = one.detach().view(-1) if one.is_contiguous() else in_memory_order(one.detach()).reshape(-1)
        whole = flat.numel() * flat.element_size() % (8 * BLOCK) == 0 and flat.data_ptr() % 8 == 0
        if whole and flat.numel() > SMALL:
            sums.append(flat.view(torch.int64).view(-1, BLOCK).sum(1))
        else:
            small[flat.dtype].append(flat)
    return [torch.cat(group) for group in (*small.values(), sums) if group]
