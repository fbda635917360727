"""Checkpoints and saved models: safetensors for tensors, JSON for the rest, each file whole, sealed, or absent.

A sealed file holds a checksum of itself, made with zeros in the checksum's own place. It is compared whenever the file
is read, so that a file in which one bit changed is refused. Files of version 0.1 have no checksum and are read as they
are; they can be told from sealed ones of which a part is lost, because only a sealed file names its version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .._files import OnFull, atomic, sync_folder, with_room, write_text
from .._version import __version__

logger = logging.getLogger("purify_fast")

#: The names of a run's last checkpoint, and of the one before it.
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"

#: Stands for the checksum while it is made: 64 hexadecimal digits of BLAKE2b, which hashes about 1 GB in a second.
_ZEROS = b"0" * 64
#: What stands before the digits, in the header of a safetensors file and in a model.json.
_IN_HEADER, _IN_JSON = b'"checksum":"', b'"checksum": "'
_PART = 2**24
#: The command in the file of options that the command line leaves beside a run.
_COMMAND = re.compile(r"^command: ([a-z ]+)$", re.MULTILINE)


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


# -- seals ------------------------------------------------------------------------------------------------------------


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=32)


def _sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[memoryview], str]:
    """The parts of a safetensors file with a checksum of itself, and the checksum."""
    # clone: safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = to_bytes(copies)
    size = int.from_bytes(data[:8], "little")
    # written again here, since safetensors orders metadata at random, and equal contents are to be equal files
    own = {**metadata, "version": __version__, "checksum": _ZEROS.decode()}
    text = json.dumps({"__metadata__": own, **json.loads(data[8 : 8 + size])}, separators=(",", ":")).encode()
    # the format wants tensors at multiples of 8
    header = text.ljust(-(-len(text) // 8) * 8)
    head = len(header).to_bytes(8, "little") + header
    # quotes inside other entries are escaped, so that this is found once
    at = head.index(_IN_HEADER + _ZEROS) + len(_IN_HEADER)
    body = memoryview(data)[8 + size :]
    content = _hash()
    content.update(head)
    content.update(body)
    digits = content.hexdigest()
    sealed = head[:at] + digits.encode() + head[at + len(_ZEROS) :]
    return [memoryview(sealed), body], digits


def _write_parts(path: Path, parts: list[memoryview], previous: Path | None = None) -> None:
    with atomic(path, previous) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)


def _header(path: Path) -> tuple[bytes, dict[str, str]]:
    """The first bytes of a safetensors file, up to its tensors, and the texts among them; ValueError if it is none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:
            raise ValueError("it is cut off, or no safetensors file")
        header = file.read(size)
    metadata = json.loads(header).get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its header is damaged")
    return size.to_bytes(8, "little") + header, metadata


def check_seal(path: Path) -> None:
    """Refuse a safetensors file that is not as it was written.

    Args:
        path: the file; one of version 0.1, which has no checksum, is accepted.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    try:
        head, metadata = _header(path)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError("its header is damaged") from error
    if not metadata.keys() - {"tree", "format"}:
        # version 0.1
        return
    digits = metadata.get("checksum")
    at = head.find(_IN_HEADER)
    if digits is None or at < 0:
        raise ValueError("its checksum is lost")
    at += len(_IN_HEADER)
    content = _hash()
    content.update(head[:at] + _ZEROS + head[at + len(_ZEROS) :])
    with path.open("rb") as file:
        file.seek(len(head))
        while part := file.read(_PART):
            content.update(part)
    if content.hexdigest() != digits:
        raise ValueError("its checksum is not that of its content: it changed after it was written")


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any, previous: Path | None = None) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one sealed file, atomically.

    Args:
        path: the file.
        tree: what it is to hold.
        previous: where the file that is there before is kept; None drops it.
    """
    tensors: list[Tensor] = []
    skeleton = json.dumps(flatten(tree, tensors))
    parts, _ = _sealed({str(i): tensor for i, tensor in enumerate(tensors)}, {"tree": skeleton})
    _write_parts(path, parts, previous)


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote; lists for tuples.

    Args:
        path: the file.

    Raises:
        ValueError: it is no such file, or changed since; the message names it.
    """
    try:
        check_seal(path)
        with safe_open(path, "pt") as file:
            skeleton = (file.metadata() or {})["tree"]
            tensors = {int(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        return restore(json.loads(skeleton), [tensors[i] for i in range(len(tensors))])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a checkpoint of this package: {error!r}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this package, or is damaged: {error}") from error


def save_checkpoint(folder: Path, tree: Any, on_full: OnFull = "stop") -> None:
    """Write a run's checkpoint, and keep the one before it.

    Args:
        folder: the run's.
        tree: what it is to hold.
        on_full: whether a full disk ends the run or is waited for.
    """
    path = folder / CHECKPOINT
    kept = f"; the checkpoint before it is kept in {path}" if path.is_file() else ""
    with_room(lambda: write_tree(path, tree, folder / PREVIOUS), path, on_full, kept)


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
    sync_folder(path.parent)
    return place


# -- saved models -----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors``, which is complete by itself, and ``model.json``, which says what it is.

    Args:
        folder: where to.
        kind: the name of the model's class.
        arguments: of its constructor, JSON values.
        state: its state dict.
        extra: further facts, JSON values.
    """
    folder = Path(folder)
    facts = {"kind": kind, "arguments": arguments, **extra, "version": __version__}
    parts, weights = _sealed(state, {"facts": json.dumps(facts)})
    with_room(lambda: _write_parts(folder / "model.safetensors", parts), folder / "model.safetensors")
    text = json.dumps({**facts, "weights": weights, "checksum": _ZEROS.decode()}, indent=2, sort_keys=True) + "\n"
    content = _hash()
    content.update(text.encode())
    sealed = text.replace((_IN_JSON + _ZEROS).decode(), _IN_JSON.decode() + content.hexdigest())
    with_room(lambda: write_text(folder / "model.json", sealed), folder / "model.json")


def _read_sealed_json(path: Path) -> Any:
    """The JSON value of a file; ValueError if it is none or not as it was written."""
    data = path.read_bytes()
    facts = json.loads(data.decode("utf-8"))
    sealed = isinstance(facts, dict) and bool(facts.keys() & {"checksum", "version", "weights"})
    if not sealed:
        return facts
    at = data.find(_IN_JSON) + len(_IN_JSON)
    content = _hash()
    content.update(data[:at] + _ZEROS + data[at + len(_ZEROS) :])
    if facts.get("checksum") != content.hexdigest():
        raise ValueError("its checksum is not that of its content: it was edited, or changed on the disk")
    return facts


def _unfinished(folder: Path) -> str:
    """What a folder without a saved model holds, in words: a training that has not ended, or nothing of the kind."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for place in (folder, *inside):
        try:
            found = last_checkpoint(place)
        except ValueError:
            # what is damaged says nothing here
            continue
        if found is None:
            continue
        part = "" if place == folder else f" (its part {place.name})"
        begun = _COMMAND.search(_text(folder / "run.yaml"))
        text = f"holds a training that has not ended{part}, at step {found['step']}; "
        if begun is None:
            return text + "run the command that began it again to go on"
        return text + f"`purify-fast {begun[1]} --config {folder / 'run.yaml'} --out {folder}` goes on with it"
    return "is not a saved model"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What `save_model` wrote beside the weights: the ``kind``, its ``arguments`` and extra facts.

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
    try:
        facts = _read_sealed_json(folder / "model.json")
    except ValueError as error:
        raise ValueError(f"{folder / 'model.json'} is damaged: {error}") from error
    kind, arguments = (facts.get("kind"), facts.get("arguments")) if isinstance(facts, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(arguments, dict):
        raise ValueError(f"{folder / 'model.json'} is damaged: it says no kind of model, or not its arguments")
    facts.pop("checksum", None)
    weights = facts.pop("weights", None)
    return facts if weights is None else _of_the_weights(folder, facts, weights)


def _of_the_weights(folder: Path, facts: dict[str, Any], weights: str) -> dict[str, Any]:
    """The facts of the weights that are there: of another model than model.json's if saving was killed in between."""
    try:
        metadata = _header(folder / "model.safetensors")[1]
        return facts if metadata.get("checksum") == weights else json.loads(metadata["facts"])
    except (KeyError, ValueError, AttributeError):
        # reading the weights says what is wrong with them
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
    facts, path = read_facts(folder), Path(folder) / "model.safetensors"
    try:
        check_seal(path)
        with safe_open(path, "pt") as file:
            return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{folder} holds a broken model: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{folder} holds a broken model: {path}: {error}") from error
