"""Count the products of a model's convolutions and linear layers, which tell whether bfloat16 makes it faster."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .copying import deep_copy, freeze
from .draws import same_draws
from .eager_mode import EagerDispatchMode

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
