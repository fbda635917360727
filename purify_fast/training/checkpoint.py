"""Reads and writes checkpoints and saved models, as safetensors with JSON in the metadata.

A file appears whole or not at all. A checksum of the content is verified at every reading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .._sealed import read_sealed, write_sealed
from .._version import __version__

#: The file name of a run's checkpoint.
CHECKPOINT = "checkpoint.safetensors"
#: The file name of a saved model.
MODEL = "model.safetensors"

#: The key of a saved model's values of ``get_extra_state`` that are no tensors.
_EXTRA = "extra_state"

#: In a checkpoint's JSON, an object with this single key stands for a tensor.
_TENSOR = "tensor of purify_fast"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one file, atomically."""
    write_sealed(path, *_encoded(tree))


def read_tree(path: Path) -> Any:
    """Read a file of `write_tree`."""
    try:
        tree, tensors = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no checkpoint ({error}): remove it to start anew") from error
    return _decoded(tree, tensors)


def _encoded(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a tree as a JSON value with references to tensors, and the tensors; TypeError if it has other values."""
    tensors: dict[str, Tensor] = {}

    def reference(tensor: Any) -> dict[str, str]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a {type(tensor).__name__} cannot be written")
        number = str(len(tensors))
        tensors[number] = tensor
        return {_TENSOR: number}

    return json.loads(json.dumps(tree, default=reference)), tensors


def _decoded(value: Any, tensors: dict[str, Tensor], numbered: bool = False) -> Any:
    """Return the tree that `_encoded` turned into a JSON value and tensors."""
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    # JSON turns the numbers by which an optimizer names its weights into texts. A model's names are texts.
    pairs = ((key, _decoded(item, tensors, numbered or key in ("optimizers", "state"))) for key, item in value.items())
    return {int(key) if numbered and key.isdecimal() else key: item for key, item in pairs}


# -- saved models -----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors``, with the weights, and with a description of the model in the file's metadata."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if others := {name: value for name, value in state.items() if name not in tensors}:
        extra = {**extra, _EXTRA: _encoded(others)[0]}
    facts = {"kind": kind, "arguments": arguments, **extra, "version": __version__}
    write_sealed(Path(folder) / MODEL, facts, tensors)


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model that `save_model` wrote."""
    path = Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not a saved model")
    try:
        facts, state = read_sealed(path)
        if "kind" not in facts:
            raise ValueError("the file's metadata has no kind of model")
    except ValueError as error:
        raise ValueError(f"{folder} holds a model that cannot be loaded: {path}: {error}") from error
    return facts, state | _decoded(facts.pop(_EXTRA, {}), {})
