"""The dtype of a model's products, and the dtype and the memory layout of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .._settings import first_tensor
from ..models.layers import evaluation_mode
from .watch import CONVOLUTIONS


class _WholeColumns(TorchFunctionMode):
    """Computes convolutions with strides whose output has a single column in float32.

    On a CPU, oneDNN computes some of them wrongly in bfloat16: outputs, or gradients of weights of up to 1e37
    (pytorch/pytorch, issues 163347 and 169688). They are small, so this costs little.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, stride = function(*args, **kwargs), (*args[3:4], kwargs.get("stride", 1))[0]
        single = function is torch.conv2d and result.dtype == torch.bfloat16 and result.shape[-1] == 1
        if not single or stride in (1, (1, 1)):
            return result
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs).bfloat16()


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), _WholeColumns():
        yield


def autocast_to(
    device: torch.device, dtype: torch.dtype, network: nn.Module | None = None
) -> contextlib.AbstractContextManager[Any]:
    """The autocast context in which models compute; float32 switches off an autocast of the caller.

    ``network`` is the only module that computes in the context. If its attribute ``has_strides`` is False, none of its
    convolutions is looked at, which takes a twentieth of the time of a network with small maps.
    """
    strides = getattr(network, "has_strides", True)
    # A compiled step is compared with the step as written.
    if device.type == "cpu" and dtype == torch.bfloat16 and strides and not torch.compiler.is_compiling():
        return _on_cpu()
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
    for old in {weight: None for layer in layers for weight in layer._parameters.values() if weight is not None}:
        if old.dim() == 4 or "memory_format" not in how:
            fresh = torch.empty_like(old, **how)
            if (fresh.dtype, fresh.stride()) != (old.dtype, old.stride()):
                new[id(old)] = nn.Parameter(fresh.copy_(old.detach()), old.requires_grad)
    for layer in layers:
        layer._parameters |= {name: new.get(id(weight), weight) for name, weight in layer._parameters.items()}
