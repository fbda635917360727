"""Files and folders: checks, atomic writes, locks, sealed files, and the package's templates."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2
    from torch import Tensor


def check_folder(name: str, path: str | Path | None) -> None:
    """Raise a ValueError if the path of a folder, or one of its parents, is a file."""
    places = () if path is None else (Path(path), *Path(path).parents)
    # `exists` comes first: a folder that is created between the calls would otherwise be taken for a file.
    place = next((place for place in places if place.exists()), None)
    if place is not None and not place.is_dir():
        raise ValueError(f"{name} must be a folder, got {path}: {place} is a file")


#: The files by which `what_is` knows a folder, and what they show. A finished work has all files of an unfinished one.
CHECKPOINT, MODEL, REPORT = "checkpoint.safetensors", "model.safetensors", "report.json"
KINDS = {
    REPORT: "holds a report",
    "certificates.json": "holds certificates",
    MODEL: "holds a model",
    CHECKPOINT: "holds an unfinished training, which `purify-fast train --resume {}` continues",
    "log.jsonl": "holds a training without a checkpoint so far, which `purify-fast train --resume {}` begins anew",
    "rows": "holds an unfinished evaluation, which the same command continues",
    "train": "holds images for --data",
}


def what_is(folder: str | Path) -> str:
    """Say what a folder holds, as the end of a sentence that begins with the folder."""
    place = Path(folder)
    if not place.exists():
        return "does not exist"
    if not place.is_dir():
        return "is a file"
    texts = (text for name, text in KINDS.items() if (place / name).exists())
    return next(texts, "holds no file of a training or an evaluation").format(place)


def usable_device(name: str) -> str:
    """Check the name of a device, and replace "auto" by "cuda" or "cpu"."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: give auto, cpu, cuda or cuda:N") from error
    return name


def check_shapes(what: str, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise an error if tensors are missing, unknown or have a wrong shape."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - shapes.keys())]
    unknown = [f"{name} is unknown" for name in sorted(shapes.keys() - expected.keys())]
    other = [
        f"{name} is {list(shapes[name])}, must be {list(expected[name])}"
        for name in sorted(expected.keys() & shapes.keys())
        if tuple(shapes[name]) != tuple(expected[name])
    ]
    first = [problem for problems in (missing, unknown, other) for problem in problems[:3]]
    if first:
        count = len(missing + unknown + other) - len(first)
        raise ValueError(f"{what}: {'; '.join(first)}{f', and {count} more' if count else ''}")


# -- files that are written atomically ---------------------------------------------------------------------------------

LOCK = ".purify_fast.lock"
#: Seconds for which the program tries to get a lock, because the run that has the lock may end within this time.
PATIENCE = 0.2


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        # Sync the names of the files, so that the file keeps its new name after a power failure. Windows cannot open a
        # folder, and some network file systems cannot sync a folder.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            # The system's error has no file name if the write failed, for example on a full disk. Add the name.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. A part of a name that is not UTF-8 is written with backslashes."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


# -- locks of folders --------------------------------------------------------------------------------------------------


class FolderInUse(ValueError):
    """Raised if another run writes into the folder."""


@contextlib.contextmanager
def folder_lock(folder: str | Path | None) -> Iterator[None]:
    """Lock a folder against all other processes and threads within the block. The same thread may lock it again."""
    if folder is None:
        yield
        return
    # The import of filelock takes 0.1 seconds, and ``--help`` on the command line should not wait for it.
    from filelock import FileLock, Timeout

    check_folder("the run's folder", folder)
    folder = Path(folder)
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    # Each thread has its own lock, which it may take again.
    lock = FileLock(path, timeout=PATIENCE, poll_interval=PATIENCE / 10, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(f"{folder} is in use by another run; wait for it, end it, or give another folder") from None
    try:
        yield
    finally:
        # Remove the lock file before the lock is released. After the release, another run may have locked the file.
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
        # Remove the empty folders among those that this block created.
        with contextlib.suppress(OSError):
            for place in created:
                place.rmdir()


# -- safetensors files with tensors, JSON values and a checksum of both, compared at every reading ---------------------

#: The only key of a file's metadata, for a checksum, a space, and JSON: several entries would have no fixed order.
_ENTRY = "purify_fast"


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    # What needs PyTorch is imported where it is used, because the command line's ``--help`` imports this module.
    from ._settings import digest, text_hash

    names = sorted(tensors)
    return text_hash(json.dumps([text, names, digest(*(tensors[name] for name in names))])).hexdigest()


def write_sealed(path: Path, content: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and a JSON value to one safetensors file, atomically."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, so clone them.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(content)
    data = save(copies, {_ENTRY: f"{_checksum(text, copies)} {text}"})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def read_sealed(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the JSON value and the tensors that `write_sealed` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    # Open the file only once, because another process may replace it at any time. safetensors.safe_open opens it twice.
    data = path.read_bytes()
    try:
        tensors = load(data)
        # A safetensors file begins with 8 bytes for the length of its header. The JSON header and the tensors follow.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        checksum, _, text = header["__metadata__"][_ENTRY].partition(" ")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"the file is cut off or damaged, or another program wrote it ({error!r})") from error
    if checksum != _checksum(text, tensors):
        raise ValueError("the checksum does not match the content: the file changed after it was written")
    return json.loads(text), tensors


# -- jinja2 templates, which are files beside the modules that use them ------------------------------------------------


@functools.cache
def environment(package: str) -> jinja2.Environment:
    """The jinja2 environment of a package's templates."""
    # The import of jinja2 takes 0.05 seconds, and ``--help`` on the command line should not wait for it.
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def render(package: str, template: str, **values: Any) -> str:
    """Render a template to text."""
    return environment(package).get_template(template).render(values)
