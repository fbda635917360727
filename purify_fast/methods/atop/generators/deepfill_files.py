"""Checkpoints of deepfillv2-pytorch: what they hold of a generator, read without unpickling anything but tensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...._files import atomic, check_shapes
from .deepfill import DeepFillGenerator

_FIRST = "stage1.conv1.conv.weight"  # [width, in_channels, 5, 5]
_CONSTANT = "stage2.contextual_attention.fuse_weight"


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
    except Exception as error:  # bytes that are no pickle fail in any way
        raise ValueError(f"{path} is not a file of torch.save: {error!r}") from error


def _without_wrapper(state: Mapping) -> dict:
    """Names as `nn.DataParallel` saves them, without their ``module.``."""
    return {name.removeprefix("module.") if isinstance(name, str) else name: value for name, value in state.items()}


def _generator_state(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Where the generator's state dict is, for messages, and that dict."""
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict, it holds a {type(content).__name__}")
    inner = {f"{path}[{key!r}]": value for key, value in content.items() if isinstance(value, Mapping)}
    places = {place: _without_wrapper(state) for place, state in {str(path): content, **inner}.items()}
    found = [place for place, state in places.items() if _FIRST in state]
    if not found:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"{path} holds no generator: {_FIRST} is neither in it nor under a key of it; it has {keys}")
    place = f"{path}['G']" if f"{path}['G']" in found else found[0]
    if len(found) > 1 and not place.endswith("['G']"):
        raise ValueError(f"{path} holds several generators, none of them under 'G': {', '.join(found)}")
    for name, value in places[place].items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{place}: {name} must be a tensor, it is a {type(value).__name__}")
    return place, places[place]


def load_official(path: str | Path) -> DeepFillGenerator:
    """Read a generator; see `DeepFillGenerator.from_official`."""
    place, state = _generator_state(Path(path))
    first = state[_FIRST]
    width, in_channels = first.shape[:2] if first.dim() == 4 else (0, 0)
    try:
        generator = DeepFillGenerator(in_channels, width)
    except ValueError as error:
        raise ValueError(f"{place}: {_FIRST} is {list(first.shape)}: {error}") from error
    own = generator.state_dict()
    constant = state.setdefault(_CONSTANT, own[_CONSTANT])  # checkpoints older than that buffer lack it
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (state, own)]
    check_shapes(f"{place} is not a generator of deepfillv2-pytorch", *shapes)
    if not torch.equal(constant.to(own[_CONSTANT]), own[_CONSTANT]):
        raise ValueError(f"{place}: {_CONSTANT} is {constant.tolist()}, must be the identity")
    generator.load_state_dict(state)
    return generator.eval()


def save_official(generator: DeepFillGenerator, path: str | Path) -> None:
    """Write a generator, the file whole or absent; see `DeepFillGenerator.save_official`."""
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    with atomic(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save({"G": state}, temporary)
