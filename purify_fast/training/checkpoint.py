"""Checkpoints and saved models: safetensors for tensors, JSON for the rest; each file is whole or absent.

A file holds a checksum of its content, which is compared whenever it is read: a file in which one bit changed is
refused. In a safetensors file the checksum stands in the metadata.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .._files import OnFull, atomic, with_room, write_text
from .._fingerprint import digest, text_hash
from .._version import __version__

logger = logging.getLogger("purify_fast")

#: The names of a run's last checkpoint, and of the one before it.
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"

#: The one entry of a file's metadata: a checksum, a space, and JSON. Several entries would have no fixed order.
_ENTRY = "purify_fast"
#: The command in the file of options that the command line leaves beside a run.
_COMMAND = re.compile(r"^command: ([a-z ]+)$", re.MULTILINE)


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Nested dicts and lists as JSON values; the tensors among them are appended to ``tensors``, on the CPU."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):  # pairs, since optimizer states have integer keys
        return {"dict": [[key, flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(item, tensors) for item in value]}
    return {"value": value}


def restore(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given; lists for tuples."""
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[str(value)]
    if kind == "dict":
        return {key: restore(item, tensors) for key, item in value}
    if kind == "list":
        return [restore(item, tensors) for item in value]
    return value


# -- files with a checksum --------------------------------------------------------------------------------------------


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return text_hash(json.dumps([text, names, digest(*(tensors[name] for name in names))])).hexdigest()


def _write(path: Path, content: Any, tensors: Mapping[str, Tensor], previous: Path | None = None) -> None:
    """Write tensors and a JSON value as one safetensors file; ``previous`` is where the file before it goes."""
    # clone: safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(content)
    data = save(copies, {_ENTRY: f"{_checksum(text, copies)} {text}"})
    with atomic(path, previous) as temporary:
        temporary.write_bytes(data)


def _read_content(path: Path) -> Any:
    """The JSON value of a file that `_write` wrote, without a look at its checksum."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})[_ENTRY].partition(" ")[2])


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The JSON value and the tensors that `_write` wrote.

    Raises:
        ValueError: the file is damaged, or something else; the message says what is wrong, without the file's name.
    """
    try:
        with safe_open(path, "pt") as file:
            checksum, _, text = (file.metadata() or {})[_ENTRY].partition(" ")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"it is cut off, damaged, or another program's ({error!r})") from error
    if checksum != _checksum(text, tensors):
        raise ValueError("its checksum is not that of its content: it changed after it was written")
    return json.loads(text), tensors


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any, previous: Path | None = None) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one file, atomically.

    The file that had the name before gets the name ``previous``; None drops it.
    """
    tensors: list[Tensor] = []
    skeleton = flatten(tree, tensors)
    _write(path, skeleton, {str(i): tensor for i, tensor in enumerate(tensors)}, previous)


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote; lists for tuples.

    Raises:
        ValueError: it is no such file, or changed since; the message names it.
    """
    try:
        return restore(*_read(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of this package, or is damaged: {error}") from error


def save_checkpoint(folder: Path, tree: Any, on_full: OnFull = "stop") -> None:
    """Write a run's checkpoint, and keep the one before it; ``on_full`` says whether a full disk is waited for."""
    path = folder / CHECKPOINT
    remark = f"; the checkpoint before it is kept in {path}" if path.is_file() else ""
    with_room(lambda: write_tree(path, tree, folder / PREVIOUS), path, on_full, remark)


def last_checkpoint(folder: Path, set_aside: bool = False) -> Any:
    """A run's last whole checkpoint. Of a damaged one a warning tells, and the one before it is taken.

    Args:
        folder: the run's.
        set_aside: whether a damaged file is renamed, so that the next checkpoint does not take its place.

    Returns:
        What `save_checkpoint` was given, None if there is no checkpoint.

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
            place = f"it is set aside as {_set_aside(bad)}, and " if set_aside else ""
            logger.warning("%s; %sthe checkpoint before it is taken, of step %s", why, place, tree.get("step"))
        return tree
    if damaged:
        raise ValueError(f"{'; '.join(damaged.values())}; there is no other checkpoint: remove it to begin anew")
    return None


def _set_aside(path: Path) -> Path:
    """Give a damaged file a name that nothing reads; the new name."""
    number = 1
    while (place := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    path.rename(place)
    return place


# -- saved models -----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors``, which is complete by itself, and ``model.json``, which shows its facts.

    Args:
        folder: where to.
        kind: the name of the model's class.
        arguments: of its constructor, JSON values.
        state: its state dict.
        extra: further facts, JSON values.
    """
    weights, shown = Path(folder) / "model.safetensors", Path(folder) / "model.json"
    facts = {"kind": kind, "arguments": arguments, **extra, "version": __version__}
    with_room(lambda: _write(weights, facts, state), weights)
    with_room(lambda: write_text(shown, _facts_text(facts)), shown)


def _facts_text(facts: dict[str, Any]) -> str:
    """The text of a ``model.json``: the facts and a checksum of them, in one form."""
    checksum = text_hash(json.dumps(facts, sort_keys=True)).hexdigest()
    return json.dumps({**facts, "checksum": checksum}, indent=2, sort_keys=True) + "\n"


def _check_facts(path: Path) -> None:
    """ValueError unless a ``model.json`` is as `save_model` wrote it."""
    try:
        text = path.read_bytes().decode()
        facts = json.loads(text)
        if not isinstance(facts, dict) or not isinstance(facts.pop("checksum", None), str):
            raise ValueError("it has no checksum")
        if text != _facts_text(facts):
            raise ValueError("its checksum is not that of its content: it was edited, or changed on the disk")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _unfinished(folder: Path) -> str:
    """What a folder without a saved model holds, in words: a training that has not ended, or nothing of the kind."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for place in (folder, *inside):
        try:
            saved = last_checkpoint(place)
        except ValueError:
            # a damaged checkpoint says nothing here
            continue
        if saved is None:
            continue
        part = "" if place == folder else f" (its part {place.name})"
        options = folder / "run.yaml"
        command = _COMMAND.search(options.read_text(encoding="utf-8", errors="replace")) if options.is_file() else None
        text = f"holds a training that has not ended{part}, at step {saved['step']}; "
        if command is None:
            return text + "run the command that began it again to go on"
        return text + f"`purify-fast {command[1]} --config {options} --out {folder}` goes on with it"
    return "is not a saved model"


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What `save_model` wrote with the weights: the ``kind``, its ``arguments`` and extra facts.

    Args:
        folder: where the model was saved.

    Raises:
        FileNotFoundError: a file is missing; the message names it, and what the folder holds instead, such as a
            training that has not ended.
        ValueError: the facts are damaged.
    """
    folder = Path(folder)
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {folder} {_unfinished(folder)}")
    _check_facts(folder / "model.json")
    try:
        # of the weights that are there: model.json shows another model if saving was killed between the two files
        facts = _read_content(folder / "model.safetensors")
        if "kind" not in facts:
            raise ValueError("it says no kind of model")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} holds a broken model: {error!r}") from error
    return facts


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model as `save_model` wrote it.

    Args:
        folder: where it was saved.

    Returns:
        (facts, state dict).

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is damaged, or changed since it was written.
    """
    read_facts(folder)
    path = Path(folder) / "model.safetensors"
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{folder} holds a broken model: {path}: {error}") from error
