"""Checkpoints and saved models: safetensors for tensors, JSON for the rest; each file is whole or absent.

A file holds a checksum of its content, which is compared whenever it is read: a file in which one bit changed is
refused. Checksum and JSON stand in the metadata of the safetensors file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import OnFull, with_room
from .._sealed import read_sealed, write_sealed
from .._version import __version__

logger = logging.getLogger("purify_fast")

#: The names of a run's last checkpoint, and of the one before it.
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
#: The checkpoint of the last good validation, to which a run returns after a collapse.
GOOD = "checkpoint.good.safetensors"
#: The name of a saved model.
MODEL = "model.safetensors"

#: The one key of an object that stands for a tensor in a checkpoint's JSON.
_TENSOR = "tensor of purify_fast"
#: The command in the file of options that the command line leaves beside a run.
_COMMAND = re.compile(r"^command: ([a-z ]+)$", re.MULTILINE)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any, previous: Path | None = None) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one file, atomically.

    The file that had the name before gets the name ``previous``; None drops it.
    """
    tensors: dict[str, Tensor] = {}

    def reference(tensor: Tensor) -> dict[str, str]:
        number = str(len(tensors))
        tensors[number] = tensor
        return {_TENSOR: number}

    write_sealed(path, json.loads(json.dumps(tree, default=reference)), tensors, previous)


def read_tree(path: Path) -> Any:
    """Read what `write_tree` wrote; tuples come back as lists.

    Raises:
        ValueError: the file is not such a file, or it changed since; the message names it.
    """
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
        # optimizers use numbers as keys, and JSON cannot
        return {int(key) if key.isdecimal() else key: restored(item) for key, item in value.items()}

    return restored(tree)


def save_checkpoint(folder: Path, tree: Any, on_full: OnFull = "stop") -> None:
    """Write a run's checkpoint, and keep the one before it; ``on_full`` says whether a full disk is waited for."""
    path = folder / CHECKPOINT
    remark = f"; the checkpoint before it is kept in {path}" if path.is_file() else ""
    with_room(lambda: write_tree(path, tree, folder / PREVIOUS), path, on_full, remark)


def last_checkpoint(folder: Path, set_aside: bool = False) -> Any:
    """Read a run's last whole checkpoint. A damaged checkpoint gives a warning, and the one before it is taken.

    Args:
        folder: folder of the run.
        set_aside: whether a damaged file is renamed, so that the next checkpoint does not overwrite it.

    Returns:
        The value that `save_checkpoint` got; None if there is no checkpoint.

    Raises:
        ValueError: there are only damaged ones; all are named, and stay where they are.
    """
    damaged: dict[Path, str] = {}
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            tree = read_tree(path)
        except ValueError as error:
            damaged[path] = str(error)
            continue
        for bad, why in damaged.items():
            place = ""
            if set_aside:
                place = f"it is set aside as {bad.replace(bad.with_name(f'{bad.stem}.damaged{bad.suffix}'))}, and "
            logger.warning("%s; %sthe checkpoint before it is taken, of step %s", why, place, tree.get("step"))
        return tree
    if damaged:
        raise ValueError(f"{'; '.join(damaged.values())}; there is no other checkpoint: remove it to begin anew")
    return None


# -- saved models -----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors``: the weights, and in the file's metadata the facts of the model.

    Args:
        folder: the folder to write to.
        kind: the name of the model's class.
        arguments: arguments of the model's constructor, JSON values.
        state: its state dict.
        extra: further facts, JSON values.
    """
    path = Path(folder) / MODEL
    facts = {"kind": kind, "arguments": arguments, **extra, "version": __version__}
    with_room(lambda: write_sealed(path, facts, state), path)


def _unfinished(folder: Path) -> str:
    """Describe a folder without a saved model: it holds a training that has not ended, or nothing that is known."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for place in (folder, *parts):
        # a damaged checkpoint says nothing here
        with contextlib.suppress(ValueError):
            if (saved := last_checkpoint(place)) is None:
                continue
            part = "" if place == folder else f" (its part {place.name})"
            options, how = folder / "run.yaml", "run the command that began it again to go on"
            if options.is_file() and (command := _COMMAND.search(options.read_text("utf-8", errors="replace"))):
                how = f"`purify-fast {command[1]} --config {options} --out {folder}` goes on with it"
            return f"holds a training that has not ended{part}, at step {saved['step']}; {how}"
    return "is not a saved model"


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model as `save_model` wrote it.

    Returns:
        The facts, among them the ``kind`` and its ``arguments``, and the state dict.

    Raises:
        FileNotFoundError: the file is missing; the message names it, and what the folder holds instead, such as a
            training that has not ended.
        ValueError: the file is damaged, or changed since it was written.
    """
    path = Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} {_unfinished(Path(folder))}")
    try:
        facts, state = read_sealed(path)
        if "kind" not in facts:
            raise ValueError("the file's metadata names no kind of model")
    except ValueError as error:
        raise ValueError(f"{folder} holds a broken model: {path}: {error}") from error
    return facts, state
