"""Checkpoints of deepfillv2-pytorch: the generator's tensors in them, read without unpickling anything else."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...._files import atomic

#: The generator's first tensor, [width, in_channels, 5, 5], by which it is found and which tells its sizes.
FIRST = "stage1.conv1.conv.weight"


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and nothing else is unpickled: {error}") from error
    # bytes that are no pickle fail in any way
    except Exception as error:
        raise ValueError(f"{path} is not a file of torch.save: {error!r}") from error


def _without_wrapper(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Names as `nn.DataParallel` saves them, without their ``module.``."""
    return {name.removeprefix("module.") if isinstance(name, str) else name: value for name, value in state.items()}


def read_generator(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Find a generator's state dict in a file.

    Args:
        path: a ``.pth`` file with the state dict under ``G``, under another key or alone, or a ``.safetensors`` file.

    Returns:
        Where the state dict is, for messages, and its tensors by their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, holds other objects than tensors, or not exactly one generator.
    """
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict, it holds a {type(content).__name__}")
    inner = {f"{path}[{key!r}]": value for key, value in content.items() if isinstance(value, Mapping)}
    places = {place: _without_wrapper(state) for place, state in {str(path): content, **inner}.items()}
    found = [place for place, state in places.items() if FIRST in state]
    if not found:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"{path} holds no generator: {FIRST} is neither in it nor under a key of it; it has {keys}")
    place = f"{path}['G']" if f"{path}['G']" in found else found[0]
    if len(found) > 1 and not place.endswith("['G']"):
        raise ValueError(f"{path} holds several generators, none of them under 'G': {', '.join(found)}")
    for name, value in places[place].items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{place}: {name} must be a tensor, it is a {type(value).__name__}")
    return place, places[place]


def write_generator(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a generator's state dict, the file whole or absent.

    Args:
        state: the tensors by their names.
        path: a ``.safetensors`` file to hold it, or any other, which holds ``{"G": state}``.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save({"G": state}, temporary)
