"""Frozen weights in the layouts of fast products, kept until the weights change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

#: For each tensor of weights, its state, and its layouts by name.
_kept = WeakTensorKeyDictionary()
#: The largest number of layouts of a tensor. Maps of another size need another layout.
MOST = 8
#: oneDNN chooses a layout for a batch. It is always this batch, so that the layout, and with it the rounding of the
#: products, never depends on which batch came first.
BATCH = 32


def kept_layout(weight: Tensor, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Return weights in the layout ``name``, made again after a write in place, but not to ``weight.data``."""
    # A trace would record the kept tensor as a constant. Tensors of the inference mode have no version.
    if weight.requires_grad or weight.is_inference() or _get_current_dispatch_mode():
        return make()
    state = weight._version, weight.data_ptr()
    known, layouts = _kept.get(weight, (None, {}))
    if known != state:
        layouts = {}
        _kept[weight] = state, layouts
    if name not in layouts:
        if len(layouts) >= MOST:
            del layouts[next(iter(layouts))]
        layouts[name] = make()
    result: Tensor = layouts[name]
    return result


def matrix(weight: Tensor) -> Tensor:
    """Return weights ``[O, C, K, L]`` as the matrix ``[O, K L C]`` of the patches. It is a view in channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def turned(weight: Tensor) -> Tensor:
    """Return weights ``[O, C, K, L]`` as the matrix ``[C, K L O]`` of the gradient, with the taps in reverse order."""
    return weight.detach().flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2).mT


def transposed(weight: Tensor) -> Tensor:
    """Return weights ``[O, C, K, L]`` as the matrix ``[K L C, O]``, which adds up a gradient for each tap."""
    return matrix(weight).mT


def packed(weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return weights ``[O, C, K, L]`` of a convolution in bfloat16 in oneDNN's layout."""
    given = list(padding), list(stride), [1, 1], 1, [BATCH, weight.shape[1], *size]
    pack = torch.ops.mkldnn._reorder_convolution_weight
    return kept_layout(weight, ("packed", *map(tuple, (size, stride, padding))), lambda: pack(weight.detach(), *given))


def packed_gradient(weight: Tensor, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return the weights of the convolution (stride 1) that computes the images' gradient, in oneDNN's layout."""

    def make() -> Tensor:
        reverse = weight.detach().flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return packed(reverse, size, (1, 1), padding)

    return kept_layout(weight, ("gradient", tuple(size), tuple(padding)), make)


def packed_matrix(weight: Tensor, form: Callable[[Tensor], Tensor], size: Sequence[int]) -> Tensor:
    """Return a matrix of weights ``[N, M]`` as the weights ``[N, M, 1, 1]`` of a convolution, in oneDNN's layout."""

    def make() -> Tensor:
        made = form(weight.detach())[:, :, None, None].contiguous(memory_format=torch.channels_last)
        given = [0, 0], [1, 1], [1, 1], 1, [1, made.shape[1], BATCH * size[0], size[1]]
        return torch.ops.mkldnn._reorder_convolution_weight(made, *given)

    return kept_layout(weight, (form.__name__, tuple(size)), make)


def convolved(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Sequence[int], Sequence[int]],
    *,
    added: Tensor | None = None,
    name: str = "none",
) -> Tensor:
    """Compute a convolution, the sum with a map and an activation in one call of oneDNN."""
    padding, stride = settings
    given = weight, bias, list(padding), list(stride), [1, 1], 1
    if added is None:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(images, *given, name, [], "")
        return result
    # The arguments are positional because the operator's schema has them in this order without defaults.
    rest: tuple[Any, ...] = "add", 1.0, None if name == "none" else name, [], ""
    result = torch.ops.mkldnn._convolution_pointwise.binary(images, added, *given, *rest)
    return result
