"""Count the products of a model's convolutions and linear layers, which tell whether bfloat16 makes it faster."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._settings import first_tensor
from ..models.representation import evaluation_mode
from .copying import deep_copy, freeze
from .draws import same_draws
from .eager_mode import EagerDispatchMode
from .weights import CONVOLUTIONS

#: A CPU is faster in bfloat16 for a model with at least this many dense products per computed value, and in a batch of
#: at least PRODUCTS. In table `elsewhere_copies` of docs/speed.md, the networks have 13 to 68 or 81 to 995 per value.
PER_VALUE, PRODUCTS = 75, 250e6
#: A convolution with fewer input or output channels is too thin for the processor's instructions.
CHANNELS = 16


class Counter(EagerDispatchMode):
    """Counts the products of dense layers, and the computed values."""

    products = values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*args, **(kwargs or {})), function._schema.name.removeprefix("aten::")
        if isinstance(result, Tensor) and not function.is_view:
            self.values += result.numel()
            if name in ("mm", "addmm", "bmm", "baddbmm"):
                self.products += result.numel() * args[name in ("addmm", "baddbmm")].shape[-1]
            elif name == "convolution" and args[8] == 1 and min(args[1].shape[:2]) >= CHANNELS:
                self.products += result.numel() * args[1][0].numel()
        return result


def is_dense(model: nn.Module, x: Tensor) -> bool:
    """Return True if a model has so many dense products, on a batch of images, that a CPU is faster in bfloat16.

    A copy of the model predicts one image. A model that fails here is not dense; its next call shows the error.
    """
    with contextlib.suppress(Exception), torch.inference_mode(False), torch.no_grad(), same_draws(model):
        copied = freeze(deep_copy(model))
        # The weights that were copied are no computed values.
        with Counter() as counted:
            copied(x[:1])
        return bool(counted.products >= PER_VALUE * counted.values and len(x) * counted.products >= PRODUCTS)
    return False


# -- the dtype of a model's products, and the dtype and the memory layout of its weights -------------------------------


def autocast_to(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context in which copies compute; float32 switches off an autocast of the caller."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def convert_to_channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Convert the convolutions' weights to channels_last in place, if the model then still runs; return True if it
    does.

    A model that flattens maps or images with ``view`` does not run in channels_last.
    """
    to_format(model, torch.channels_last)
    first = first_tensor(model)
    example = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
    try:
        # The model is in evaluation mode, because this example must not change the statistics of BatchNorms.
        with evaluation_mode(model), torch.no_grad():
            model(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        to_format(model, torch.contiguous_format)
        return False
    return True


def to_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    convert([layer for layer in model.modules() if isinstance(layer, CONVOLUTIONS)], memory_format=memory_format)


def convert(layers: Sequence[nn.Module], **how: Any) -> None:
    """Convert the parameters of layers to another dtype or memory format, in place; shared ones stay shared."""
    new = dict[int, nn.Parameter]()
    for old in {one: None for layer in layers for one in layer._parameters.values() if one is not None}:
        if old.dim() == 4 or "memory_format" not in how:
            made = torch.empty_like(old, **how)
            if (made.dtype, made.stride()) != (old.dtype, old.stride()):
                new[id(old)] = nn.Parameter(made.copy_(old.detach()), old.requires_grad)
    for layer in layers:
        layer._parameters |= {name: new.get(id(one), one) for name, one in layer._parameters.items()}
