"""Reads and writes checkpoints and saved models. A file appears whole or not at all.

Tensors are stored as safetensors, and everything else as JSON in the metadata of the safetensors file. The metadata
also has a checksum of the content, which is verified at every reading: a file in which one bit changed is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import with_room
from .._sealed import read_sealed, write_sealed
from .._version import __version__

logger = logging.getLogger("purify_fast")

#: The file names of a run's last checkpoint and of the checkpoint before that.
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
#: The file name of a saved model.
MODEL = "model.safetensors"

#: In a checkpoint's JSON, an object with this single key stands for a tensor.
_TENSOR = "tensor of purify_fast"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any, previous: Path | None = None) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one file, atomically."""
    tensors: dict[str, Tensor] = {}

    def reference(tensor: Tensor) -> dict[str, str]:
        number = str(len(tensors))
        tensors[number] = tensor
        return {_TENSOR: number}

    write_sealed(path, json.loads(json.dumps(tree, default=reference)), tensors, previous)


def read_tree(path: Path) -> Any:
    """Read a file of `write_tree`."""
    try:
        tree, tensors = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of this package, or is damaged: {error}") from error

    def restored(value: Any) -> Any:
        if isinstance(value, list):
            return [restored(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        # optimizers use numbers as keys, but JSON turns these into strings
        return {int(key) if key.isdecimal() else key: restored(item) for key, item in value.items()}

    return restored(tree)


def save_checkpoint(folder: Path, tree: Any) -> None:
    """Write a run's checkpoint, and keep the checkpoint before it."""
    path = folder / CHECKPOINT
    remark = f"; the last checkpoint is kept in {path}" if path.is_file() else ""
    with_room(lambda: write_tree(path, tree, folder / PREVIOUS), path, remark)


def last_checkpoint(folder: Path, set_aside: bool = False) -> Any:
    """Read a run's last whole checkpoint."""
    damaged: dict[Path, str] = {}
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        # Do not ask first whether the file exists: another process may rename it between the question and the answer.
        try:
            tree = read_tree(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged[path] = str(error)
            continue
        for bad, why in damaged.items():
            place = ""
            if set_aside:
                moved = bad.replace(bad.with_name(f"{bad.stem}.damaged{bad.suffix}"))
                place = f"the file was renamed to {moved}, and "
            logger.warning("%s; %sthe checkpoint before it, of step %s, is used", why, place, tree.get("step"))
        return tree
    if damaged:
        files = "this file" if len(damaged) == 1 else "these files"
        raise ValueError(f"{'; '.join(damaged.values())}. There is no other checkpoint: remove {files} to start anew")
    return None


# -- saved models -----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors``, with the weights, and with a description of the model in the file's metadata."""
    path = Path(folder) / MODEL
    facts = {"kind": kind, "arguments": arguments, **extra, "version": __version__}
    with_room(lambda: write_sealed(path, facts, state), path)


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
    return facts, state
