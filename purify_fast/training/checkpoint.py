"""Checkpoints and saved models: safetensors for tensors, JSON for the rest, each file whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .._files import atomic, write_text


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Nested dicts and lists as JSON values; the tensors among them are appended to ``tensors``, on the CPU."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):  # pairs, since optimizer states have integer keys
        return {"dict": [[key, flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(item, tensors) for item in value]}
    return {"value": value}


def restore(tree: Any, tensors: list[Tensor]) -> Any:
    """What `flatten` was given; lists for tuples."""
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: restore(item, tensors) for key, item in value}
    if kind == "list":
        return [restore(item, tensors) for item in value]
    return value


def write_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one safetensors file, atomically."""
    tensors: list[Tensor] = []
    skeleton = json.dumps(flatten(tree, tensors))
    # clone: safetensors refuses tensors that share memory
    data = to_bytes({str(i): tensor.clone() for i, tensor in enumerate(tensors)}, {"tree": skeleton})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote; lists for tuples. Raises ValueError naming the file if it is not such a file."""
    try:
        with safe_open(path, "pt") as file:
            skeleton = (file.metadata() or {})["tree"]
            tensors = {int(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        return restore(json.loads(skeleton), [tensors[i] for i in range(len(tensors))])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this package: {error!r}") from error


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors`` and ``model.json`` (kind, constructor arguments, extra facts), each atomically."""
    folder = Path(folder)
    facts = json.dumps({"kind": kind, "arguments": arguments, **extra}, indent=2, sort_keys=True)
    data = to_bytes({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    with atomic(folder / "model.safetensors") as temporary:
        temporary.write_bytes(data)
    write_text(folder / "model.json", facts + "\n")


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What `save_model` wrote beside the weights: the ``kind``, its ``arguments`` and extra facts.

    Args:
        folder: where the model was saved.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: the facts are damaged.
    """
    folder = Path(folder)
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {folder} is not a saved model")
    try:
        facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'model.json'} is damaged: {error}") from error
    kind, arguments = (facts.get("kind"), facts.get("arguments")) if isinstance(facts, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(arguments, dict):
        raise ValueError(f"{folder / 'model.json'} is damaged: it says no kind of model, or not its arguments")
    return facts


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model as `save_model` wrote it.

    Args:
        folder: where it was saved.

    Returns:
        (facts, state dict).

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is damaged.
    """
    facts = read_facts(folder)
    try:
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{folder} holds a broken model: {error!r}") from error
